"""`objects://`: as S3 is, by s3fs. It has no folders to copy, and its errors are no `OSError`."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class BotoCoreError(Exception):
    pass


BotoConnectionError = type("ConnectionError", (BotoCoreError,), {})  # its name in botocore


class EndpointConnectionError(BotoConnectionError):
    pass


class IncompleteReadError(BotoCoreError):
    pass


class ObjectStore(MemoryFileSystem):
    """Calls that `fails` says True of, by method and path, fail as those of a dead server do."""

    protocol = "objects"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fails: ClassVar[Callable[[str, str], bool]] = staticmethod(lambda method, path: False)
    error: ClassVar[type[Exception]] = EndpointConnectionError
    read: ClassVar[list[tuple[str, int, int]]] = []
    """File, first byte and end of each read of an open one."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("objects://"))

    @classmethod
    def ask(cls, method: str, path: str) -> None:
        if cls.fails(method, path):
            raise cls.error("Could not connect to the endpoint URL")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        """A listing is kept, unless the caller refuses: what others write then does not show."""
        path = self._strip_protocol(path)
        self.ask("ls", path)
        try:
            found = self.dircache[path]
        except KeyError:
            self.dircache[path] = found = super().ls(path, detail=True, **kwargs)
        return found if detail else [entry["name"] for entry in found]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are parts of names alone."""
        self.ask("makedirs", path)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self.ask("cp_file", path1)
        if self.isdir(path1):
            raise FileNotFoundError("The specified key does not exist.")
        super().cp_file(path1, path2, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        return _ReadFile(path, file.read()) if mode == "rb" else file


class _ReadFile(BytesIO):
    def __init__(self, path: str, content: bytes) -> None:
        super().__init__(content)
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        ObjectStore.ask("read", self._path)
        start = self.tell()
        content = super().read(size)
        ObjectStore.read.append((self._path, start, start + len(content)))
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _asking(name: str) -> Callable[..., Any]:
    method = getattr(MemoryFileSystem, name)

    def call(self: ObjectStore, path: Any, *args: Any, **kwargs: Any) -> Any:
        for each in path if isinstance(path, list) else [path]:
            self.ask(name, each)
        return method(self, path, *args, **kwargs)

    return call


for _name in ("info", "cat_file", "pipe_file", "rm_file", "rm", "open"):
    setattr(ObjectStore, _name, _asking(_name))

fsspec.register_implementation("objects", ObjectStore)

"""What may pass by itself is no mistake: exit code 1, after which a run is started again."""

from __future__ import annotations

import errno
import gzip
import http.client
import os
import socket
import urllib.error
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from harness import train_on_c4
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from object_store import EndpointConnectionError, IncompleteReadError

from torchtitan import cli
from torchtitan.data.files import file_size, reading, sha256
from torchtitan.data.json_lines import JsonLines, JsonLineStream
from torchtitan.data.mapped import map_file
from torchtitan.data.sources import TextFiles
from torchtitan.data.whole_files import FileWriter
from torchtitan.errors import (
    ConfigError,
    DataError,
    OutageError,
    TitanError,
    begin_errors_with,
    may_pass,
    outage_or,
)

BROKEN_DISK = "/proc/self/mem"  # can be opened, and its first bytes cannot be read: EIO


class Answer(Exception):
    """An HTTP error as requests, httpx and huggingface_hub have them."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status)


class ClientError(Exception):
    """One as aiohttp has them."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class TransportError(Exception):
    """Of httpx, which is no OSError."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


PASSING = [
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ConnectionError("Server Disconnected"),
    TimeoutError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    http.client.IncompleteRead(b"half"),
    urllib.error.HTTPError("http://host", 503, "Service Unavailable", None, None),
    Answer(429),
    Answer(500),
    ClientError(503),
    TransportError("connect"),
    EndpointConnectionError("Could not connect"),
    IncompleteReadError("10 of 20 bytes"),
    caused(RuntimeError("cannot generate"), ConnectionResetError()),
    caused(LocalEntryNotFoundError("not in the cache"), TransportError("connect")),
]
STAYING = [
    FileNotFoundError(errno.ENOENT, "No such file"),
    FileNotFoundError("no such dataset"),
    PermissionError(errno.EACCES, "Permission denied"),
    IsADirectoryError(errno.EISDIR, "Is a directory"),
    OSError(errno.EROFS, "Read-only file system"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError("Couldn't deserialize thrift"),  # pyarrow, of a damaged file
    gzip.BadGzipFile("Not a gzipped file"),
    urllib.error.HTTPError("http://host", 404, "Not Found", None, None),
    Answer(401),
    ClientError(404),
    ValueError("bad JSON"),
    caused(RuntimeError("cannot generate"), ValueError("bad JSON")),
    OfflineModeIsEnabled("HF_HUB_OFFLINE=1"),
    caused(ConnectionError("could not reach"), OfflineModeIsEnabled("HF_HUB_OFFLINE=1")),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass(error: Exception) -> None:
    assert may_pass(error)
    raised = outage_or(DataError, "the data cannot be read", error)
    assert type(raised) is OutageError and "the data cannot be read" in str(raised)


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_what_comes_again(error: Exception) -> None:
    assert not may_pass(error)
    raised = outage_or(DataError, "the data cannot be read", error)
    assert type(raised) is DataError and str(raised) == "the data cannot be read"


def test_an_outage_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit) as caught,
        cli.exit_on_user_error(),
        begin_errors_with("training.dataset"),
    ):
        raise outage_or(DataError, "the hub is away", ConnectionResetError())
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "error: training.dataset: the hub is away. This may be temporary: try again\n"
    )


def test_a_path_that_cannot_be_reached_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, cli.exit_on_user_error():
        raise OSError(errno.ESTALE, "Stale file handle", "/data/run")
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "error: /data/run: Stale file handle. This may be temporary: try again\n"
    )
    with pytest.raises(FileNotFoundError), cli.exit_on_user_error():  # a bug of ours
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/run")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_used_is_a_mistake(number: int, capsys) -> None:
    with pytest.raises(SystemExit) as caught, cli.exit_on_user_error():
        raise OSError(number, "Not here", "/data/run")
    assert caught.value.code == 2 and capsys.readouterr().err == "error: /data/run: Not here\n"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, OutageError), (errno.EDQUOT, ConfigError)]
)
def test_token_shards_that_cannot_be_written_now_are_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[TitanError]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    message = rf"--out: cannot write .*/shard\.bin: {os.strerror(number)}"
    with pytest.raises(kind, match=message), FileWriter(tmp_path / "shard.bin") as file:
        file.write(bytes(10))
    assert not (tmp_path / "shard.bin").exists()


@pytest.mark.skipif(not os.path.exists(BROKEN_DISK), reason="no /proc")
def test_a_disk_that_fails_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    message = f"^{BROKEN_DISK} cannot be read: Input/output error"
    with pytest.raises(OutageError, match=message):
        TextFiles([BROKEN_DISK])[0]
    with pytest.raises(OutageError, match=message):
        JsonLines([BROKEN_DISK], "text")
    with pytest.raises(OutageError, match=message):
        sha256(BROKEN_DISK)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_no_outage(number: int, capsys) -> None:
    """Restarts would be in vain."""
    full = OSError(number, os.strerror(number), "/data/run")
    error = outage_or(ConfigError, "x cannot be written", full)
    assert isinstance(error, ConfigError)
    assert str(error) == "x cannot be written. Free some space, then try again"
    with pytest.raises(DataError, match=r"^a\.txt cannot be read: .*\. Free "), reading("a.txt"):
        raise full
    with pytest.raises(SystemExit) as caught, cli.exit_on_user_error():
        raise full
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(". Free some space, then try again\n")


def test_a_mapping_that_fails_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(OutageError, match="Input/output error"):
        map_file(Path(__file__), "<u2")


class Reset(BytesIO):
    """A file behind a URL; the connection is gone after its first line."""

    def __next__(self) -> bytes:
        if self.tell():
            raise TransportError("peer closed connection without sending complete message body")
        return super().__next__()


def test_a_connection_that_is_reset_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "open", lambda *args, **options: Reset(b'{"text": "a"}\n' * 2))
    texts = iter(JsonLineStream(["https://host/a.jsonl"], "text"))
    assert next(texts) == "a"
    with pytest.raises(OutageError, match=r"host/a\.jsonl cannot be read: TransportError: peer"):
        next(texts)


def test_a_storage_that_does_not_answer_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    def url_to_fs(url: str) -> None:
        raise TransportError("connect")

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    with pytest.raises(OutageError, match=r"a\.txt cannot be read: TransportError: connect"):
        file_size("https://host/a.txt")


@pytest.mark.long
def test_a_hub_that_does_not_answer_is_one_message_and_exit_code_1(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = train_on_c4(tmp_path, env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: training.dataset = 'c4': 'allenai/c4': the Hugging Face hub")
    assert "could not be reached" in last and last.endswith("This may be temporary: try again")

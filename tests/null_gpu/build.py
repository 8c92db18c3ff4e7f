"""Compiles the null GPU for the CUDA build of PyTorch that is installed, see null_gpu.c."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_SOURCES = [_HERE / "null_gpu.c", _HERE / "null_nccl.c"]
_TAKEN_OVER = re.compile(r"(__cuda|cuda|cu[A-Z]|cublas|cudnn|nccl)\w*")
# They only keep tables of the process, and need no device.
_LEFT_TO_THE_RUNTIME = re.compile(r"__cuda(Register|Unregister|PushCall|PopCall)\w*")


def build(folder: Path) -> Path:
    """Make `libcuda.so.1` in a folder. Preload it, and name the folder in LD_LIBRARY_PATH.

    It needs gcc, and nm of binutils. The headers came with PyTorch: structures differ by version.
    """
    import triton  # which is not with PyTorch's CPU build

    packages = Path(torch.__file__).parents[1]
    headers = next(packages.glob("nvidia/*/include/driver_types.h")).parent
    more_headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    written = set()
    for source in _SOURCES:
        written |= set(re.findall(r"^[\w ]+[ *](\w+)\(", source.read_text(), flags=re.MULTILINE))
    stubs = folder / "stubs.c"
    missing = (_called_by_torch() | _driver(headers)) - written
    stubs.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in sorted(missing)))
    library = folder / "libcuda.so.1"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        f"-I{headers}",
        f"-I{more_headers}",
        "-o",
        library,
    ]
    subprocess.run([*command, *_SOURCES, stubs, "-ldl", "-lpthread"], check=True)
    return library


def _called_by_torch() -> set[str]:
    """The functions of NVIDIA's libraries that PyTorch's libraries leave undefined."""
    names = set()
    for library in (Path(torch.__file__).parent / "lib").glob("lib*.so"):
        command = ["nm", "--dynamic", "--undefined-only", "--just-symbols", library]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names |= {name.split("@")[0] for name in listed.split()}
    taken_over = {name for name in names if _TAKEN_OVER.fullmatch(name)}
    return {name for name in taken_over if not _LEFT_TO_THE_RUNTIME.fullmatch(name)}


def _driver(headers: Path) -> set[str]:
    """The functions of the driver, which Triton calls too."""
    header = (headers / "cuda.h").read_text()
    newer = re.findall(r"#define\s+cu\w+\s+(cu[A-Z]\w+_v\d)\b", header)
    return {*re.findall(r"CUDAAPI\s+(cu[A-Z]\w+)\(", header), *newer}

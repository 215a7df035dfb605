"""Compiles C++ on first use and loads it. None of it is required: without a compiler torch computes.

A library lies in a directory of the user's own, under a name that tells sources, flags, compiler and CPU apart, and
gets there by a rename: processes that start at the same time may compile it twice, but never load half of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

COMMON = Path(__file__).parent  # headers for all libraries
FLAGS = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fvisibility=hidden", "-w"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
# Whether a product and a sum become one operation must not depend on where the compiler inlines them.
FLAGS += ["-ffp-contract=off"]
SWITCH = "DOTS_ALIGN_NATIVE"
_COMPILE_SECONDS = 600


class Unavailable(Exception):
    """There is no native library here; the message says why."""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dots_align" / "native"


def _private_directory() -> Path:
    """The cache directory, made if need be; nobody else can put a file there or exchange what leads to it."""
    directory = cache_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = directory.resolve(strict=True)
    except OSError as error:
        raise Unavailable(f"cannot make the cache directory: {error}") from None
    for path in (directory, *directory.parents):
        status = path.stat()
        others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        # In a sticky directory (/tmp) others can add entries but not exchange ours.
        if status.st_uid not in (os.geteuid(), 0) or (others_write and not status.st_mode & stat.S_ISVTX):
            raise Unavailable(f"others can write to {path}; set XDG_CACHE_HOME to a directory of your own")
    if directory.stat().st_uid != os.geteuid() or directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(f"others can write to {directory}; set XDG_CACHE_HOME to a directory of your own")
    return directory


def _compiler() -> list[str]:
    """$CXX (which may carry arguments), else the first usual one."""
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise Unavailable(f"no compiler: $CXX is {chosen!r}, which is not there")
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise Unavailable("no compiler: neither g++ nor clang++ is on the path (set CXX to name another)")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Unavailable(f"{command[0]} failed: {lines[0] if lines else f'exit status {done.returncode}'}")
    return done.stdout


def _cpu() -> str:
    """What -march=native depends on."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _fingerprint(compiler: list[str], source: Path) -> str:
    digest = hashlib.sha256()
    for path in [source, *sorted({*source.parent.glob("*.h"), *COMMON.glob("*.h")})]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((compiler, FLAGS, _run([*compiler, "--version"]), _cpu())).encode())
    return digest.hexdigest()[:24]


def _build(directory: Path, compiler: list[str], source: Path, name: str) -> Path:
    target = directory / name
    handle, temporary = tempfile.mkstemp(suffix=".so", prefix=".building-", dir=directory)
    os.close(handle)
    try:
        _run([*compiler, *FLAGS, f"-I{COMMON}", str(source), "-o", temporary])
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # before its name: a machine that fails may keep that and lose the content
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _library_path(source: Path, purpose: str) -> Path:
    if os.environ.get(SWITCH) == "0":
        raise Unavailable(f"switched off by {SWITCH}=0")
    if sys.platform != "linux":
        raise Unavailable(f"only Linux is supported, not {sys.platform}")
    compiler = _compiler()
    directory = _private_directory()
    name = f"{source.stem}-{_fingerprint(compiler, source)}.so"
    path = directory / name
    if not path.exists() or not path.stat().st_size:  # as a machine that failed may leave it
        logger.info("compiling the native %s into %s", purpose, path)
        path = _build(directory, compiler, source, name)
    return path


@functools.cache
def _load(source: Path, purpose: str, environment: tuple[str | None, ...]) -> ctypes.CDLL | str:
    """The library, or why there is none. Once for each environment, so that nothing is logged twice."""
    try:
        return ctypes.CDLL(str(_library_path(source, purpose)))
    except (Unavailable, OSError) as error:
        logger.info("no native %s, the torch path is used: %s", purpose, error)
        return str(error)


def load(source: Path, purpose: str) -> ctypes.CDLL:
    """The compiled library of one source file (with the headers beside it and beside this file).

    Args:
        purpose: what it is, for the log.

    Raises:
        Unavailable: there is none; the message says why.
    """
    # Asked for some hundred times a step: to make paths would take longer than many a kernel.
    loaded = _load(source, purpose, tuple(map(os.environ.get, (SWITCH, "CXX", "XDG_CACHE_HOME", "HOME"))))
    if isinstance(loaded, str):
        raise Unavailable(loaded)
    return loaded


@functools.cache
def openmp() -> tuple[int, int]:
    """Addresses of GOMP_parallel and omp_get_num_threads in the OpenMP runtime that torch has loaded; zeros where it
    has none. A runtime of our own beside it would fight with it for the cores.
    """
    names = ("libgomp", "libiomp5", "libomp")
    paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted((p for p in paths if Path(p).name.startswith(names)), key=lambda p: "torch" not in p)
    for path in found:
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            functions = runtime.GOMP_parallel, runtime.omp_get_num_threads
            parallel, num_threads = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
            return parallel, num_threads
    return 0, 0

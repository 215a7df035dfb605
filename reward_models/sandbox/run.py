"""Running code that a model wrote against tests it must not see or touch.

Three processes (see `runner`): the tests run in the checker, the model's code in a process of its own that has no
network, no other processes or threads, no files but Python's own (to read) and a small scratch folder in memory, and
hard limits of time and memory. The checker calls the program's functions over a pipe and compares plain data, so a
program can print, exit, patch or pretend what it likes: only the values it returns count.

How well a machine can isolate is found out once, best first:
    namespaces  an empty root file system, network, PID and user namespaces, with Landlock where the kernel has it
    landlock    Landlock for files (no scratch folder; names and sizes of other files can be seen, no contents), as in a
                container that allows no namespaces
    weak        limits and whatever the kernel gives, only if $DOTS_ALIGN_SANDBOX is `weak`
In all but `weak`, seccomp admits only the system calls of `syscalls`. Without any isolation running code is refused.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models.sandbox.runner import EXIT_NO_SANDBOX, EXIT_TIMEOUT

MODES = ("namespaces", "landlock", "weak")
_GRACE_SECONDS = 30.0  # to start, to end and to tell of it, which takes long on a busy machine
_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Limits:
    """What one run may use. `seconds` is wall time, start of the interpreter included; a file may have the size of the
    scratch folder.
    """

    seconds: float = 10.0
    memory_mb: int = 512
    scratch_mb: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Verdict:
    """`reason` says why it did not pass: the test and its error, `timeout`, `crashed` (the checker was ended, for
    example by what the program sent it), or `killed` (from outside).
    """

    passed: bool
    reason: str = ""


def run_tests(
    program: str,
    tests: list[str],
    names: list[str],
    setup: str = "",
    limits: Limits = Limits(),
    mode: str | None = None,
) -> Verdict:
    """Whether every test passes.

    Args:
        program: the model's source text, run as a module.
        tests: trusted source texts, run one after the other in the checker; each passes unless it raises.
        names: what the tests use of the program; nothing else of it is visible to them.
        setup: trusted source text that runs in the checker before the tests.
        mode: one of `MODES`; the best of this machine if not given.

    Raises:
        ValueError: there are no tests.
        RuntimeError: the sandbox could not be made, so nothing was run.
    """
    if not tests:
        raise ValueError("no tests to run: an answer that is never tested can be neither right nor wrong")
    request = {"program": program, "names": names, "setup": setup, "tests": tests}
    return _run(request, limits, mode or isolation())


@functools.cache
def isolation() -> str:
    """The best of `MODES` that works here.

    Raises:
        RuntimeError: none does; the message says what was missing.
    """
    if (wanted := os.environ.get("DOTS_ALIGN_SANDBOX", "")) not in ("", *MODES):
        raise RuntimeError(f"DOTS_ALIGN_SANDBOX={wanted!r}: must be one of {', '.join(MODES)}")
    problems = []
    for mode in (wanted,) if wanted else MODES[:-1]:
        try:
            verdict = _run({**_TRIAL, "tests": [] if mode == "weak" else _PROMISES}, _TRIAL_LIMITS, mode)
            if verdict.passed:
                return mode
            problems.append(f"{mode}: {verdict.reason}")
        except RuntimeError as error:
            problems.append(f"{mode}: {error}")
    raise RuntimeError(
        "cannot isolate code a model wrote, so none is run: it takes Linux with seccomp and either user namespaces or "
        f"Landlock ({'; '.join(problems)}). On a machine with nothing to lose, DOTS_ALIGN_SANDBOX=weak runs it with "
        "limits alone."
    )


# What is promised, tried out: code runs, does not read what lies outside, and is one process.
_TRIAL = {
    "program": """
import os
def readable(paths):
    found = []
    for path in paths:
        try:
            found.append(open(path).read(1) and path)
        except OSError:
            pass
    return found
def forks():
    try:
        return os.fork() >= 0
    except OSError:
        return False
""",
    "names": ["readable", "forks"],
    "setup": "",
}
_TRIAL_LIMITS = Limits(seconds=60.0)  # a busy machine is not one that cannot isolate
_PROMISES = ["assert readable(['/etc/passwd', '/proc/self/environ']) == []", "assert forks() is False"]


def _run(request: dict[str, Any], limits: Limits, mode: str) -> Verdict:
    settings = {
        "mode": mode,
        "seconds": limits.seconds,
        "scratch_bytes": limits.scratch_mb << 20,
        "limits": {
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "memory_bytes": limits.memory_mb << 20,
            "file_bytes": limits.scratch_mb << 20,
            "open_files": limits.open_files,
        },
        "readable": _python_paths(),
        "import_from": _ROOT,
    }
    start = f"import sys; sys.path.append({_ROOT!r}); from reward_models.sandbox.runner import boot; boot()"
    # No site-packages, nothing written, nothing of our environment; a fixed hash seed, so that a program answers alike.
    command = [sys.executable, "-S", "-s", "-P", "-c", start, json.dumps(settings)]
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "HOME": "/tmp", "TZ": "UTC"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        output, complaint = process.communicate(json.dumps(request).encode(), limits.seconds + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        output, complaint = b"", b""
    finally:
        process.kill()  # the others die with it
        process.communicate()
    return _read_verdict(process.returncode, output, complaint.decode(errors="replace"))


@functools.cache
def _python_paths() -> list[str]:
    """What an interpreter reads while it runs: the standard library, shared libraries and time zones."""
    library, shared = sysconfig.get_path("stdlib"), f"{sys.base_prefix}/lib"
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return [path for path in dict.fromkeys([library, shared, *system]) if Path(path).exists()]


def _read_verdict(code: int, output: bytes, complaint: str) -> Verdict:
    if output:
        return Verdict(**json.loads(output))
    if code == EXIT_NO_SANDBOX or complaint:
        raise RuntimeError(f"the sandbox could not be made: {complaint.strip()[-500:] or 'for no known reason'}")
    return Verdict(False, {EXIT_TIMEOUT: "timeout", -9: "killed"}.get(code, "crashed"))

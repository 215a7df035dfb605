"""The processes of one sandboxed run: launcher, checker, program.

    trainer ==request==> launcher  (waits, kills at the deadline)
                            └ checker   (reads the tests, asserts, writes the verdict); first process of its namespace
                                 └ program   (the model's code; answers the checker's calls)

The program is forked and confined before the checker has read anything, and has no descriptor but the channel on which
it is asked for values: there is no secret in its memory, and nothing it can write is a verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

from reward_models.sandbox import confine
from reward_models.sandbox.remote import Channel, Connection, Program

TYPE_CHECKING = False
if TYPE_CHECKING:  # so that it costs nothing at run time
    from collections.abc import Iterator
    from typing import Any, NoReturn

EXIT_NO_SANDBOX, EXIT_TIMEOUT = 70, 124


def main(settings: dict[str, Any]) -> NoReturn:
    """Runs what stands on stdin, a JSON object of `program`, `names`, `setup` and `tests`; writes {"passed": …,
    "reason": …} to stdout. Exits with 124 at the deadline, with 70 and a reason on stderr if there can be no sandbox.

    Args:
        settings: `mode`, `seconds`, `scratch_bytes`, and the `limits` of `confine`.
    """
    deadline = time.monotonic() + settings["seconds"]
    silence = os.open(os.devnull, os.O_RDWR)  # the new root has no devices
    with _no_sandbox_if_it_fails():
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # out of memory, the kernel should not choose the trainer
        if settings["mode"] == "namespaces":
            confine.enter_namespaces()
        confine.die_with_parent()
        confine.adopt_orphans()
    if not (checker := os.fork()):
        _checker(settings, silence)
    in_time = select.select([os.pidfd_open(checker)], [], [], max(deadline - time.monotonic(), 0))[0]
    if not in_time:
        os.kill(checker, signal.SIGKILL)
    status = os.waitpid(checker, 0)[1]
    _end_descendants()
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF if in_time else EXIT_TIMEOUT)


def _end_descendants() -> None:
    """The program dies with the checker, by the kernel's hand; this waits until it has. Only where isolation is weak
    can there be others.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
                for child in file.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


@contextlib.contextmanager
def _no_sandbox_if_it_fails() -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError) as error:
        os.write(2, str(error).encode())
        os._exit(EXIT_NO_SANDBOX)


def _checker(settings: dict[str, Any], silence: int) -> NoReturn:
    with _no_sandbox_if_it_fails():
        confine.die_with_parent()
        if settings["mode"] == "namespaces":
            confine.enter_new_root(settings["readable"], settings["scratch_bytes"])
        else:
            os.chdir("/")
    requests, answers = os.pipe(), os.pipe()
    if not os.fork():
        _program(settings, silence, (requests[0], answers[1]))
    os.close(requests[0])
    os.close(answers[1])
    verdict_to = os.dup(1)
    os.dup2(silence, 1)  # tests may print
    channel = Channel(answers[0], requests[1])
    with _no_sandbox_if_it_fails():
        confine.confine(settings["mode"], settings["readable"], settings["limits"])
        if problem := _ready(channel):
            raise OSError(problem)
    verdict = _verdict(Connection(channel), json.loads(_read_all(0)))
    os.write(verdict_to, json.dumps(verdict).encode())
    os._exit(0)


def _ready(channel: Channel) -> str | None:
    try:
        return channel.receive()
    except EOFError:
        return "the confined process ended before it began"


def _program(settings: dict[str, Any], silence: int, channel: tuple[int, int]) -> NoReturn:
    """Keeps nothing but its channel, gives up everything else, and only then sees the model's code."""
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    low, high = sorted(channel)
    for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(first, last)
    pipe, problem = Channel(*channel), None
    try:
        confine.die_with_parent()
        confine.confine(settings["mode"], settings["readable"], settings["limits"])
    except (OSError, KeyError) as error:
        problem = str(error) or type(error).__name__
    pipe.send(problem)
    if problem is None:
        Program(pipe).serve()
    os._exit(0)


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _verdict(connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
    where = "program"
    try:
        connection.run(request["program"])
        remotes = {name: connection.find(name) for name in request["names"]}
        names: dict[str, Any] = {"__name__": "tests", **remotes}
        where = "setup"
        exec(compile(request["setup"], where, "exec"), names)
        names |= remotes  # a set-up that holds a stub of the tested function does not hide the real one
        for number, test in enumerate(request["tests"], start=1):
            where = f"test {number}"
            exec(compile(test, where, "exec"), names)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the program has not passed
        return {"passed": False, "reason": f"{where}: {type(error).__name__}: {error}"[:500]}
    return {"passed": True, "reason": ""}


def boot() -> NoReturn:
    """Entry of the fresh interpreter: its only argument is the settings as JSON."""
    settings = json.loads(sys.argv.pop())
    sys.path.remove(settings["import_from"])
    main(settings)

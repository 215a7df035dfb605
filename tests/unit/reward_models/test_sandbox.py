"""The sandbox against programs that want out of it, or a verdict they have not earned."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from reward_models.sandbox.run import MODES, Limits, Verdict, isolation, run_tests

TEST = ["assert answer() == 42"]


def programs(file: str, group: str = "") -> dict[str, str]:
    """Of a text file beside this one: name to source. `# name` begins a program, `## group: …` a group."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    if group:
        text = text.partition(f"\n## {group}:")[2].partition("\n## ")[0]
    parts = re.split(r"\n\n# (\w+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


HARMFUL, PRETENDING, ENDLESS = (
    programs("hostile_programs.txt", group) for group in ("cannot_do_harm", "cannot_pretend", "deadline")
)
HONEST = programs("honest_programs.txt")
PATIENT = Limits(seconds=60.0)  # on a busy machine a process takes long to start


def _available(mode: str) -> bool:
    try:
        return run_tests("def answer(): return 42", TEST, ["answer"], limits=PATIENT, mode=mode).passed
    except RuntimeError:
        return False


@pytest.fixture(scope="module", params=MODES[:-1])
def mode(request: pytest.FixtureRequest) -> str:
    if not _available(request.param):
        pytest.skip(f"this machine cannot isolate by {request.param}")
    return request.param


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, object]]:
    out, secret = tmp_path / "out", tmp_path / "secret.txt"
    out.mkdir()
    secret.write_text("the answer is 42")
    for path in (out, secret):
        path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # A name of this run's own: others may be testing on this machine.
        mark = f"mark-{uuid4().hex}"
        yield {"OUT": out, "PARENT": os.getpid(), "PORT": port, "SECRET": secret, "NULL": "\0", "MARK": mark}


def limits(seconds: float) -> Limits:
    """The odd fraction of a second tells the processes of this run from all others: forks share their command line."""
    return Limits(seconds=seconds + random.SystemRandom().random() / 100)


def processes_of(limits: Limits) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if repr(limits.seconds).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def filled(source: str, places: dict[str, object]) -> str:
    return re.sub("@([A-Z]+)@", lambda found: str(places[found[1]]), source)


def attack(source: str, places: dict[str, object], mode: str, seconds: float) -> Verdict:
    """Runs it and looks for what it left."""
    folders = [folder for folder in ("/tmp", "/dev/shm", str(places["OUT"])) if os.path.isdir(folder)]
    before, allowed = [set(os.listdir(folder)) for folder in folders], limits(seconds)
    verdict = run_tests(filled(source, places), TEST, ["answer"], limits=allowed, mode=mode)
    assert not processes_of(allowed)
    new = {name for folder, names in zip(folders, before, strict=True) for name in set(os.listdir(folder)) - names}
    assert not new & {places["MARK"], "large", "f0", "link", "copy", "program"}
    assert list(Path(str(places["OUT"])).iterdir()) == []
    return verdict


def test_there_are_enough_of_them() -> None:
    assert min(len(HARMFUL), len(PRETENDING), len(ENDLESS)) > 10
    assert len({**HARMFUL, **PRETENDING, **ENDLESS}) == len(HARMFUL) + len(PRETENDING) + len(ENDLESS) > 80


@pytest.mark.parametrize("name", HARMFUL)
def test_it_cannot_do_harm(name: str, places: dict[str, object], mode: str) -> None:
    verdict = attack(HARMFUL[name], places, mode, 30.0)
    assert not verdict.passed
    assert verdict.reason != "timeout"
    assert "SyntaxError" not in verdict.reason  # a mistake of ours rather than a refusal
    assert "NameError" not in verdict.reason


@pytest.mark.parametrize("name", PRETENDING)
def test_it_cannot_pretend(name: str, places: dict[str, object], mode: str) -> None:
    assert not attack(PRETENDING[name], places, mode, 3.0).passed


@pytest.mark.parametrize("name", ENDLESS)
def test_the_deadline_ends_it(name: str, places: dict[str, object], mode: str) -> None:
    """By the launcher's hand: the trainer, which waits some seconds longer, would call it `killed`."""
    assert attack(ENDLESS[name], places, mode, 0.6) == Verdict(False, "timeout")


def test_the_attacks_would_work_outside(places: dict[str, object]) -> None:
    """Or the tests above would show nothing."""
    for name in ("read_etc", "read_secret", "write_outside", "network_tcp", "shared_memory", "start_a_thread", "fork"):
        source = filled(HARMFUL[name], places) + "\nimport os\nif answer() == 42: os._exit(7)"
        assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 7, name
    (Path("/dev/shm") / str(places["MARK"])).unlink()


# --------------------------------------------------------------------------------------------- what it must not hinder


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(name: str, mode: str) -> None:
    program, _, test = HONEST[name].partition("\n---\n")
    assert run_tests(program, [test], ["f"], limits=PATIENT, mode=mode) == Verdict(True)


def test_a_scratch_folder_is_there_with_namespaces() -> None:
    if not _available("namespaces"):
        pytest.skip("this machine cannot isolate by namespaces")
    program = "def f():\n    open('x', 'w').write('42')\n    return int(open('x').read())"
    assert run_tests(program, ["assert f() == 42"], ["f"], limits=PATIENT, mode="namespaces").passed


def run(program: str, *tests: str, setup: str = "") -> Verdict:
    return run_tests(program, list(tests), ["f"], setup, PATIENT)


def test_a_program_answers_alike_every_time() -> None:
    """Also where it depends on the order of a set."""
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})"
    test = "import json\nassert False, json.dumps(f())"
    assert len({run(program, test).reason for _ in range(3)}) == 1


def test_reasons_say_which_test_failed() -> None:
    program = "def f(x):\n    return 10 // x"
    assert run(program, "assert f(5) == 2", "f(0)").reason.startswith("test 2: ZeroDivisionError: in the program")
    assert run(program, "assert f(5) == 3").reason == "test 1: AssertionError: "
    assert run("def g(): pass", "f()").reason.startswith("program: AttributeError")
    assert run(program, "assert f == f", setup="raise KeyError(1)").reason == "setup: KeyError: 1"


def test_a_setup_with_a_stub_does_not_hide_the_program() -> None:
    assert run("def f(): return 42", "assert f() == 42", setup="def f(): pass").passed


def test_no_tests_are_refused() -> None:
    with pytest.raises(ValueError, match="no tests"):
        run_tests("", [], [])


def test_nothing_outlives_a_trainer_that_is_killed(mode: str) -> None:
    allowed = limits(60.0)
    script = (
        "from reward_models.sandbox.run import *\n"
        f"run_tests('while True: pass', ['f()'], ['f'], limits=Limits(seconds={allowed.seconds!r}), mode={mode!r})"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    while len(processes_of(allowed)) < 3 + 1:  # launcher, checker, program; the script's own line holds it too
        time.sleep(0.02)
        assert trainer.poll() is None
    trainer.kill()
    trainer.wait()
    give_up = time.monotonic() + 300
    while processes_of(allowed):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_many_at_once_leave_nothing(mode: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    enough, little = limits(60.0), limits(1.0)
    runs = [("def answer(): return 42", enough), ("while True: pass", little), ("import os\nos._exit(0)", enough)] * 4
    with ThreadPoolExecutor(6) as pool:
        verdicts = pool.map(lambda run: run_tests(run[0], TEST, ["answer"], limits=run[1], mode=mode).passed, runs)
    assert list(verdicts) == [True, False, False] * 4
    assert not processes_of(enough) + processes_of(little)


# ------------------------------------------------------------------------------------------------- where there is none

# What a container without rights looks like: these calls are refused (x86-64 and the number that all machines share).
DENIED = """
import ctypes, json, os, struct, sys
def op(code, value, yes=0, no=0): return struct.pack("HBBI", code, yes, no, value)
program = op(0x20, 0)
for number in json.loads(sys.argv[1]):
    program += op(0x15, number, 0, 1) + op(0x06, 0x00050001)
program += op(0x06, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program)
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)), 0, 0) == 0
from reward_models.sandbox.run import isolation
try:
    print(isolation())
except RuntimeError as error:
    print("refused:", error)
"""
UNSHARE, LANDLOCK = {"x86_64": 272, "aarch64": 97}.get(os.uname().machine, 0), 444


def isolation_without(*calls: int, **environment: str) -> str:
    told_nothing = {name: value for name, value in os.environ.items() if name != "DOTS_ALIGN_SANDBOX"}
    return subprocess.run(
        [sys.executable, "-c", DENIED, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=True,
        env={**told_nothing, "PYTHONPATH": os.getcwd(), **environment},
    ).stdout.strip()


def test_without_namespaces_landlock_does(mode: str) -> None:
    if mode == "landlock":
        assert isolation_without(UNSHARE) == "landlock"


def test_without_isolation_nothing_is_run_unless_told() -> None:
    refused = isolation_without(UNSHARE, LANDLOCK)
    assert refused.startswith("refused: cannot isolate code a model wrote")
    assert "DOTS_ALIGN_SANDBOX=weak" in refused
    assert isolation_without(UNSHARE, LANDLOCK, DOTS_ALIGN_SANDBOX="weak") == "weak"


def test_a_mode_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTS_ALIGN_SANDBOX", "strong")
    isolation.cache_clear()
    with pytest.raises(RuntimeError, match="must be one of namespaces, landlock, weak"):
        isolation()
    isolation.cache_clear()


def test_weak_isolation_still_ends_and_leaves_no_process() -> None:
    allowed = limits(1.0)
    program = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(100)\nwhile True: pass"
    )
    verdict = run_tests(program, TEST, ["answer"], limits=allowed, mode="weak")
    assert not verdict.passed
    assert not processes_of(allowed)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_an_ordinary_user_is_isolated_too() -> None:
    """By whatever the kernel gives to anybody: some let only root make namespaces."""
    script = "from reward_models.sandbox.run import isolation; print(isolation())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            user=65534,
            group=65534,
            cwd="/",
            env={"PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=False,
        )
    except PermissionError:
        pytest.skip("another user may not run this Python")
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip("another user may not read this checkout")
    if "cannot isolate code a model wrote" in done.stderr:
        assert not _available("landlock")
    else:
        assert done.stdout.strip() in MODES[:-1], done.stderr

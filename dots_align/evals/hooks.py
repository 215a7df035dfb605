"""Running on-save hooks so that none of them can cost the run: each ends within its time, and its failure is a result.

A hook runs in the trainer, which waits for it, or in a process of its own, in a queue beside training. That process
can be killed, by us when its time is up or by anybody else, and takes what it started with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dots_align.config import HookSection, recipe_dict
from dots_align.evals.hook_process import checked_metrics
from dots_align.runtime import preserved_rng

# A hook gets the published directory and the recipe; the mapping it returns is logged as metrics of that step.
Hook = Callable[[Path, Any], dict[str, float] | None]
LOGS = "hooks"  # what hooks in processes of their own print, by hook and step, in the run directory
AGAIN_SECONDS = 1.0  # after which a hook in the trainer is interrupted once more
# Of a launch: a process beside the trainer is none of its ranks.
LAUNCH_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")


@dataclass(frozen=True)
class SaveHook:
    """A hook of a recipe. `everywhere`: it takes part on all processes of the trainer."""

    name: str
    function: Hook
    section: HookSection
    everywhere: bool = False


@dataclass(frozen=True)
class HookResult:
    """What became of a hook on the checkpoint of `step`; `error` says why it is not `done`."""

    step: int
    hook: str
    status: Literal["done", "failed", "timed_out", "killed"]
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """As a line of `hooks.jsonl`."""
        return {name: value for name, value in asdict(self).items() if name != "step"}


class HookTimeoutError(Exception):
    """A hook in the trainer has had its time."""


def run_here(hook: SaveHook, checkpoint: Path, recipe: Any, step: int, seconds: float | None) -> HookResult:
    """Runs a hook in this process; it leaves every global random generator as it was.

    Args:
        seconds: its time limit, kept by a timer that interrupts Python code; None: it has none.
    """
    started = time.monotonic()

    def ended(status: Any, metrics: dict[str, float] | None = None, error: str | None = None) -> HookResult:
        return HookResult(step, hook.name, status, round(time.monotonic() - started, 3), metrics or {}, error)

    try:
        with preserved_rng(), _time_limit(seconds):
            return ended("done", checked_metrics(hook.function(checkpoint, recipe)))
    except HookTimeoutError:
        return ended("timed_out", error=f"took longer than {seconds:g} s")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a hook is the user's code; the run goes on
        return ended("failed", error=f"{type(error).__name__}: {error}")


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    running = [True]

    def expire(*_: Any) -> None:
        if running:
            # Once may not do: Python ignores what is raised in a finalizer, such as __del__.
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
            raise HookTimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        try:
            running.clear()
        finally:  # the time may be up this very moment; nothing is interrupted from here on
            running.clear()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Background:
    """Hooks in processes of their own, one after the other in the order in which they came, while training goes on."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Future[HookResult], Callable[[], HookResult]]] = queue.Queue()
        self._waiting: list[tuple[Path, Future[HookResult]]] = []
        self._thread: threading.Thread | None = None

    def start(self, hook: SaveHook, checkpoint: Path, recipe: Any, step: int) -> None:
        """Puts a hook in line."""
        if self._thread is None:
            # A daemon: when the trainer dies it ends at once, and the kernel ends the process that it started.
            self._thread = threading.Thread(target=self._work, daemon=True, name="on_save")
            self._thread.start()
        future: Future[HookResult] = Future()
        self._waiting.append((checkpoint, future))
        self._queue.put((future, functools.partial(run_beside, hook, checkpoint, recipe, step)))

    def results(self, wait: bool) -> list[HookResult]:
        """Results that were not given out yet, in order; with `wait` those of all that are in line."""
        found = []
        while self._waiting and (wait or self._waiting[0][1].done()):
            found.append(self._waiting.pop(0)[1].result())
        return found

    def checkpoints(self) -> set[Path]:
        """Those that a hook still has to see."""
        return {checkpoint for checkpoint, _ in self._waiting}

    def _work(self) -> None:
        while True:
            future, job = self._queue.get()
            future.set_result(job())


def run_beside(hook: SaveHook, checkpoint: Path, recipe: Any, step: int) -> HookResult:
    """Runs a hook in a process of its own, which ends with its session when its time is up."""
    started, seconds = time.monotonic(), hook.section.timeout_seconds
    log = checkpoint.parent / LOGS / f"{_file_name(hook.name)}-{step}.log"
    status, metrics, error = "failed", {}, None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            answer = Path(scratch) / "answer.json"
            returncode = _call(hook, checkpoint, recipe, answer, log)
            if returncode is None:
                status, error = "timed_out", f"took longer than {seconds:g} s; its process was ended"
            elif answer.is_file():
                told = json.loads(answer.read_text(encoding="utf-8"))
                status, metrics, error = told["status"], told["metrics"], told["error"]
            elif returncode < 0:
                status, error = "killed", f"its process was ended by {signal.Signals(-returncode).name}; see {log}"
            else:
                error = f"its process ended with status {returncode}; see {log}"
    except Exception as problem:  # noqa: BLE001 - such as a full disk, or no room for another process
        error = f"{type(problem).__name__}: {problem}"
    return HookResult(step, hook.name, status, round(time.monotonic() - started, 3), metrics, error)


def _call(hook: SaveHook, checkpoint: Path, recipe: Any, answer: Path, log: Path) -> int | None:
    """The exit status of the hook's process; None if its time was up."""
    request = {
        "stage": recipe.stage,
        "recipe": recipe_dict(recipe),
        "hook": hook.section.model_dump(mode="json", by_alias=True),
        "checkpoint": str(checkpoint),
        "answer": str(answer),
        "trainer": os.getpid(),
    }
    log.parent.mkdir(exist_ok=True)
    code = f"import sys; sys.path[:] = {sys.path!r}; from dots_align.evals.hook_process import main; main()"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(hook.section),
            start_new_session=True,
            text=True,
        )
        try:
            process.communicate(json.dumps(request), timeout=hook.section.timeout_seconds)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(section: HookSection) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_PREFIXES)}
    if section.device is not None:
        kept["DOTS_ALIGN_DEVICE"] = section.device
    if section.hook == "push" and section.hub:
        kept["HF_HUB_OFFLINE"] = "0"
    return kept


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name.replace("/", "_"))[-100:]

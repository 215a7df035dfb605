"""Scoring processes: as many as there is work for, each replaced when a reward function hangs in it or kills it."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from dots_align.scoring.worker import Failure
from dots_align.types import Response

GRACE_SECONDS = 5.0
START_SECONDS = 120.0  # a reward function's module may import much
EXIT_SECONDS = 10.0  # between closing its connection and being gone; on a busy machine an interpreter takes long to end
NOT_READY = "NotReady"
CLOSED = Failure("Closed", "the scoring processes were ended")
Keep = Callable[[int, float | Failure], Any]
"""Takes the value of the response of a number."""


@dataclass(frozen=True)
class Job:
    """One reward function on several responses. `seconds` is for each of them, `at_once` how many an `async` function
    is given at a time; 0 for other functions: one after the other.
    """

    number: int
    responses: list[Response]
    seconds: float
    at_once: int


class _NotReadyError(Exception):
    """A process could not load the reward functions."""


class _Worker:
    """A scoring process. Made by the thread that uses it: it is ended by the kernel together with that thread.

    Another thread may only `kill` it, for which the one that uses it has an EOFError, and only while that one cannot
    `end` it: a descriptor closed while somebody waits for it may by then be somebody else's, and so may the number of
    a process whose exit status has been asked for.

    Raises:
        OSError: the machine cannot start another process.
    """

    def __init__(self, functions: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._functions = list(functions)
        self._connection, theirs = multiprocessing.Pipe()
        assert isinstance(theirs, Connection)
        start = f"from dots_align.scoring.worker import main; main({theirs.fileno()})"
        code = f"import sys; sys.path[:] = {sys.path!r}; {start}"
        command, end = [sys.executable, "-c", code], theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[end], stdin=subprocess.DEVNULL, start_new_session=True)
        self._ready = False

    def start(self, job: Job) -> None:
        """Raises: EOFError, if the process is gone; _NotReadyError, if it never got so far."""
        if not self._ready:
            with contextlib.suppress(EOFError, OSError):
                self._connection.send(self._functions)
                self._ready = self._connection.poll(START_SECONDS) and self._connection.recv()
            if not self._ready:
                raise _NotReadyError
        self._connection.send((job.number, job.responses, job.seconds, job.at_once))

    def next_answer(self, seconds: float) -> tuple[int, float | Failure] | None:
        """The next answer; None if there is none within `seconds`. Raises: EOFError, if the process is gone."""
        return self._connection.recv() if self._connection.poll(seconds) else None

    def kill(self) -> None:
        """Kills it and what it has started, which may hold its end of the connection open."""
        if self._process.poll() is None:  # its number is not yet another's
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, patience: float = 0.0) -> int:
        """Kills it; returns its exit status, which is -9 unless it ends by itself within `patience` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()
        self._connection.close()
        return self._process.wait()


class ScoringPool:
    """Runs jobs on the functions it was made with, in processes that never outlive the trainer.

    Args:
        functions: their names, as in a recipe, and keyword arguments.
        num_workers: most processes at a time; they are started when there is work for them.

    Attributes:
        busy_seconds: how long its processes have been at work, all together.
    """

    def __init__(self, functions: Sequence[tuple[str, dict[str, Any]]], num_workers: int) -> None:
        self._functions = functions
        self.num_workers = num_workers
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="scoring")
        self._local = threading.local()
        self._workers: set[_Worker] = set()
        self._closed = False
        self.busy_seconds, self._lock = 0.0, threading.Lock()
        self._not_ready: Failure | None = None

    def submit(self, job: Job) -> Future[list[float | Failure]]:
        """Puts a job in line; what comes of it is the value of each response."""
        try:
            return self._threads.submit(self._run, job)
        except RuntimeError:  # closed meanwhile
            refused: Future[list[float | Failure]] = Future()
            refused.set_result(self._run(job))
            return refused

    def try_again(self) -> None:
        """Starts processes again after one could not load the reward functions; till then all jobs fail like that."""
        self._not_ready = None

    def close(self) -> None:
        """Ends all processes, one that is still at work too; what is not scored by then has failed."""
        with self._lock:  # nobody ends one of them meanwhile
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown()
        with self._lock:
            left, self._workers = self._workers, set()
        for worker in left:
            worker.end()

    def _run(self, job: Job) -> list[float | Failure]:
        """One job, restarted behind each response that hangs or kills the process."""
        found: list[float | Failure | None] = [None] * len(job.responses)
        while not self._closed and (missing := [i for i, value in enumerate(found) if value is None]):
            rest = Job(job.number, [job.responses[i] for i in missing], job.seconds, job.at_once)
            failure = self._not_ready or self._collect(
                rest, lambda index, value, at=missing: found.__setitem__(at[index], value)
            )
            if failure is not None:
                left = [i for i in missing if found[i] is None]
                # One after the other, the next one is to blame; of many at once, nobody knows.
                for index in left if job.at_once or failure.kind == NOT_READY else left[:1]:
                    found[index] = failure
        return [CLOSED if value is None else value for value in found]

    def _collect(self, job: Job, keep: Keep) -> Failure | None:
        """Keeps answers until all are there; else says why the process is no more."""
        try:
            worker = self._worker()
        except OSError as error:
            return self._cannot_start(f"no scoring process could be started ({error})")
        if worker is None:
            return CLOSED
        waiting = job.seconds
        if job.at_once:  # it keeps the time of each response itself, unless it blocks its loop
            waiting = job.seconds * math.ceil(len(job.responses) / job.at_once) + GRACE_SECONDS
        started = None
        try:
            worker.start(job)
            started = time.monotonic()
            for _ in job.responses:
                answer = worker.next_answer(waiting)
                if answer is None:
                    self._end(worker)
                    return Failure("Timeout", f"took longer than {job.seconds:g} s; its process was ended")
                keep(*answer)
        except _NotReadyError:
            status = self._end(worker, EXIT_SECONDS)
            if self._closed:
                return CLOSED
            return self._cannot_start(f"the scoring process could not load it (exit status {status}); see its output")
        except (EOFError, OSError):
            status = self._end(worker, EXIT_SECONDS)
            return CLOSED if self._closed else Failure("Crash", f"ended its process (exit status {status})")
        finally:
            if started is not None:
                with self._lock:
                    self.busy_seconds += time.monotonic() - started
        return None

    def _cannot_start(self, why: str) -> Failure:
        self._not_ready = failure = Failure(NOT_READY, why)
        return failure

    def _worker(self) -> _Worker | None:
        """This thread's process, started if need be; None if all are to end."""
        with self._lock:
            worker: _Worker | None = getattr(self._local, "worker", None)
            if self._closed:
                return None
            if worker is None or worker not in self._workers:
                worker = self._local.worker = _Worker(self._functions)
                self._workers.add(worker)
            return worker

    def _end(self, worker: _Worker, patience: float = 0.0) -> int:
        """Called by the thread that uses it."""
        with self._lock:
            self._workers.discard(worker)
        return worker.end(patience)


class AsyncLine:
    """The responses that an `async` function has yet to see: one job at a time, so that no more are in work than it
    allows; whatever has come by the time that one is done makes the next.
    """

    def __init__(self, pool: ScoringPool, number: int, seconds: float, at_once: int) -> None:
        self._pool, self._number, self._seconds, self._at_once = pool, number, seconds, at_once
        self._waiting: list[Response] = []
        self._done: list[Future[list[float | Failure]]] = []
        self._running = False
        self._changed = threading.Condition()

    def add(self, responses: Sequence[Response]) -> None:
        with self._changed:
            self._waiting += responses
            self._start()

    def results(self) -> list[float | Failure]:
        """The values of all responses, in the order they were added, when the last is there."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            return [value for job in self._done for value in job.result()]

    def _start(self) -> None:
        """Begins the next job, if there is one and none runs; the lock, which a thread may take twice, is held."""
        if self._running or not self._waiting:
            return
        job, self._waiting = Job(self._number, self._waiting, self._seconds, self._at_once), []
        self._running = True
        self._pool.submit(job).add_done_callback(self._take)

    def _take(self, done: Future[list[float | Failure]]) -> None:
        with self._changed:
            self._done.append(done)
            self._running = False
            self._start()
            self._changed.notify_all()

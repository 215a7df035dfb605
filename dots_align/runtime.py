"""What every stage stands on: the processes of a launch, the device, seeds, quiet libraries, progress bars, metrics."""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import random
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from dots_align.config import recipe_dict

logger = logging.getLogger("dots_align")
Result = TypeVar("Result")
SECONDS_BETWEEN_LINES = 15
"""Of progress in a log file."""


class _BarFriendlyHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging() -> None:
    """One line a message on stderr for us, the main process only; libraries speak up when something is wrong."""
    if not logger.handlers:
        handler = _BarFriendlyHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
        logger.propagate = False
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # where it is not imported yet: that takes a second
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    for name in ("accelerate", "datasets", "deepspeed", "DeepSpeed", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which trl imports, warns that it has no GPU
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|trl|peft|accelerate")


def device() -> torch.device:
    """The accelerator if there is one, else the CPU; `DOTS_ALIGN_DEVICE` overrides."""
    if name := os.environ.get("DOTS_ALIGN_DEVICE"):
        return _named_device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _named_device(name: str) -> torch.device:
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"DOTS_ALIGN_DEVICE={name}: torch knows no such device; give cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"DOTS_ALIGN_DEVICE={name}: torch {torch.__version__} sees no GPU here; unset it, or give cpu")
    return found


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    return rank() == 0


def start_processes(timeout_minutes: float) -> None:
    """Joins the other processes of an `accelerate launch` or `torchrun`; a process alone makes a group of one.

    Args:
        timeout_minutes: how long a process waits for another one before it gives up.
    """
    if dist.is_initialized():
        return
    # Sharding is ours; accelerate only launches. A config of type FSDP would make it wrap the model as well.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    timeout, place = timedelta(minutes=timeout_minutes), device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    if world_size() > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave() -> NoReturn:
    """Ends this process, which has done what it was to do, without taking the interpreter down first.

    Threads of gloo outlive `destroy_process_group` where anything still holds a group, as a device mesh does. One that
    gives back a tensor while the interpreter goes aborts the process, and a launcher takes that for a failure.
    """
    # What an interpreter does first: waits for the threads that are not daemons, then runs what was registered.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:  # the disk is full, or whoever read it is gone
            status = 120  # as an interpreter's
    os._exit(status)


def die(error: BaseException) -> NoReturn:
    """Ends this process of several at once, naming it; the launcher then ends the others."""
    print(
        f"dots-align: rank {rank()} of {world_size()} ({socket.gethostname()}, process {os.getpid()}) failed: "
        f"{type(error).__name__}: {error}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # not sys.exit: leaving a process group in good order would wait for the others


def leave_to_main() -> NoReturn:
    """Ends this process for a reason the main process is telling. Not at once: the launcher would end the main process
    before it has spoken.
    """
    time.sleep(20)
    os._exit(1)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def on_main(action: Callable[[], Result]) -> Result:
    """Runs `action` on the main process alone and gives every process its result.

    If it raises, the main process raises and the others end without a word: there is one message, not one a process.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, False]
    try:
        if is_main_process():
            outcome = [action(), True]
    finally:
        dist.broadcast_object_list(outcome, src=0)
        if not outcome[1] and not is_main_process():
            leave_to_main()
    return outcome[0]


def gather_objects(value: Result) -> list[Result]:
    """The value of every process, by rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: torch.Tensor) -> None:
    """Adds up a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leaves every global random generator as it was: what happens inside cannot change a training run."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class _Lines(tqdm):
    """A line every now and then, for a log file, where a bar cannot be drawn over itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._shown = time.monotonic()
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """`msg`: what tqdm wipes a bar out with; there is nothing to wipe out."""
        if msg is None and time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """As `display`."""


def progress(total: int, description: str, unit: str = "it", initial: int = 0) -> tqdm:
    """A progress bar on stderr, shown by the main process once two seconds have passed; in a log file, a line a
    while.
    """
    return (tqdm if sys.stderr.isatty() else _Lines)(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        delay=2,
        mininterval=0.1,
        leave=False,
        dynamic_ncols=True,
        disable=not is_main_process(),
    )


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class MetricsLog:
    """Appends to `metrics.jsonl`, `router.jsonl`, `samples.jsonl` and `hooks.jsonl`, and tells trackers if asked.

    Args:
        directory: the run directory.
        resume_step: lines of later steps are dropped, for they will be written again.
        recipe: of the run; its `trackers` are told of all metrics.
    """

    def __init__(self, directory: Path, resume_step: int = 0, recipe: Any = None) -> None:
        self.directory, self._started = directory, time.monotonic()
        self._last: dict[str, float] = {}
        for name in ("metrics", "router", "samples", "hooks"):
            _drop_after(directory / f"{name}.jsonl", resume_step)
        self._trackers = None
        if recipe is not None and recipe.trackers and is_main_process():
            self._trackers = Trackers(recipe.trackers, directory, resume_step, recipe_dict(recipe))

    def log(self, step: int, values: dict[str, float]) -> None:
        if not is_main_process():
            return
        self._last.update(values)
        self._append("metrics", {"step": step, "time": round(time.monotonic() - self._started, 3), **values})
        if self._trackers is not None:
            self._trackers.log(step, values)

    def log_router(self, step: int, layers: list[int], load: list[list[float]]) -> None:
        rounded = [[round(share, 6) for share in row] for row in load]
        self._append("router", {"step": step, "layers": layers, "load": rounded})

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            self._append("samples", {"step": step, **sample})

    def log_hook(self, step: int, record: dict[str, Any]) -> None:
        """What became of an on-save hook on the checkpoint of `step`."""
        self._append("hooks", {"step": step, **record})

    def _append(self, name: str, value: dict[str, Any]) -> None:
        if is_main_process():
            with (self.directory / f"{name}.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(value, ensure_ascii=False) + "\n")


class Trackers:
    """TensorBoard, wandb and trackio, as accelerate drives them; started with the first values.

    Args:
        names: of them.
        directory: the run directory. resume_step: later steps will be logged again. recipe: recorded with the run.

    Raises:
        ValueError: one is not installed.
    """

    def __init__(self, names: Sequence[str], directory: Path, resume_step: int, recipe: dict[str, Any]) -> None:
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"trackers names {name}, which is not installed; pip install {name}")
        run = {"config": recipe, "name": directory.name}
        self._options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": directory, "purge_step": resume_step + 1},
            "wandb": {"run_name": "dots_align", "dir": str(directory), **run},
            "trackio": {"run_name": "dots_align", **run},
        }
        self._names = names
        self._started: list[Any] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hands values on; those of a step that is over, such as a late evaluation's, keep their step."""
        if not self._started:
            self._started = [self._start(name) for name in self._names]
        for tracker in self._started:
            if tracker.name == "wandb":  # it refuses steps that fall
                tracker.log({**values, "step": step})
            else:
                tracker.log(values, step=step)
            if tracker.name == "tensorboard":
                tracker.tracker.flush()

    def _start(self, name: str) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # what a tracker logs about itself goes through it
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](**self._options[name])
        tracker.start()
        if name == "wandb":
            tracker.tracker.define_metric("*", step_metric="step")
        atexit.register(tracker.finish)
        return tracker


def _drop_after(path: Path, step: int) -> None:
    """Keeps only whole lines of steps up to `step`; a run that was killed may have left later ones, or half a line."""
    if not path.is_file() or not is_main_process():
        return
    kept = []
    # Half a line may end in half a character. Not splitlines: text may hold U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)

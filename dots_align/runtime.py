"""What every stage stands on: the processes of a launch, the device, seeds, quiet libraries, progress bars, the run
directory and its metrics.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import random
import shutil
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

from dots_align import __version__
from dots_align.config import Section, recipe_dict, recipe_differences

logger = logging.getLogger("dots_align")
Result = TypeVar("Result")


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
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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


def progress(total: int, description: str, unit: str = "it", initial: int = 0) -> tqdm:
    """A progress bar on stderr, shown by the main process once two seconds have passed; in a log file, a line a
    while.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        delay=2,
        mininterval=0.1 if sys.stderr.isatty() else 15,
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


def recipe_hash(recipe: Section) -> str:
    """Identifies what a run computes."""
    return hashlib.sha256(json.dumps(_identity(recipe), sort_keys=True).encode()).hexdigest()[:16]


def _identity(recipe: Section) -> dict[str, Any]:
    """The keys that change what is computed, so not how it is spread: a run may go on with other processes, if together
    they take the same batch.
    """
    values = recipe_dict(recipe)
    for key in ("overwrite", "parallel", "trackers"):
        values.pop(key, None)
    launch = values.pop("launch", {"backend": "embedded"})
    if launch["backend"] != "embedded":  # its checkpoints and its order of minibatches are others
        values["launch"] = {key: launch[key] for key in ("backend", "mode", "warmup_batches")}
    train = values.get("train") or {}
    if "per_device_train_batch_size" in train:
        parts = train.pop("per_device_train_batch_size"), train.pop("gradient_accumulation_steps"), world_size()
        train["total_batch_size"] = parts[0] * parts[1] * parts[2]
    return values


def open_run_directory(recipe: Any) -> Path:
    """Makes `recipe.output_dir` this run's: fresh, or the same recipe's own earlier attempt, which will be resumed. It
    stays this process's until it ends.

    Raises:
        ValueError: the directory belongs to another recipe, or holds something that is no run, and `overwrite` is off;
        a run is at work in it; it cannot be made; or overwriting it would delete what the recipe reads.
    """
    return on_main(lambda: _open_run_directory(recipe))


def _open_run_directory(recipe: Any) -> Path:
    directory = Path(recipe.output_dir)
    record = directory / "run.json"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir={directory}: this is a file; choose another output_dir")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={directory}: cannot be made ({error.strerror}); choose another") from None
    _hold(directory)
    if any(directory.iterdir()):
        if _is_ours(record) and (recipe.overwrite or _never_started(directory, recipe)):
            _check_overwrite(directory, record, recipe)
            _empty(directory, record)
        elif problem := _foreign(directory, record, recipe):
            remedy = ", or give overwrite=true to delete what is there" if _is_ours(record) else ""
            raise ValueError(f"output_dir={directory}: {problem}; choose another output_dir{remedy}")
    if not record.is_file():
        write_json(
            record,
            {
                "stage": recipe.stage,
                "recipe": recipe_dict(recipe),
                "identity": _identity(recipe),
                "recipe_hash": recipe_hash(recipe),
                "created": now(),
                "version": __version__,
            },
        )
    return directory


_held: dict[tuple[int, int], int] = {}  # descriptors of this process's run directories, by device and inode


def _hold(directory: Path) -> None:
    """Locks a directory for this process, if its file system can; the lock ends with it, however it ends."""
    place = directory.stat().st_dev, directory.stat().st_ino
    if place in _held:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held[place] = descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise ValueError(f"output_dir={directory}: another process is at work in it; choose another") from None


def leave_run_directories() -> None:
    """Lets other processes work in them."""
    while _held:
        os.close(_held.popitem()[1])


def _check_overwrite(directory: Path, record: Path, recipe: Any) -> None:
    """Raises ValueError if emptying the directory would delete what the recipe reads, or runs beside its own."""
    whole = directory.resolve()
    for key, value in _paths(recipe_dict(recipe)):
        if Path(value).resolve().is_relative_to(whole):
            told = f"emptying it would delete {key}={value}, which this run reads; choose another"
            raise ValueError(f"output_dir={directory}: {told}")
    others = sorted(path.parent.name for path in directory.glob("*/run.json"))
    if others and json.loads(record.read_text(encoding="utf-8"))["stage"] != "pipeline":
        raise ValueError(f"output_dir={directory}: other runs lie in it ({', '.join(others)}); move them")


def _paths(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of what a recipe reads."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        if isinstance(value, str) and key in ("path", "checkpoint", "data"):
            yield f"{prefix}{key}", value
        yield from _paths(value, f"{prefix}{key}.")


def _empty(directory: Path, record: Path) -> None:
    """Deletes what a run left, its record last: until then it can be told to be one."""
    for path in sorted(directory.iterdir(), key=lambda path: path == record):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_ours(record: Path) -> bool:
    """Whether a run.json was written here, not by something else that uses the name."""
    try:
        return {"stage", "recipe", "recipe_hash", "version"} <= json.loads(record.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _never_started(directory: Path, recipe: Any) -> bool:
    """Whether another recipe got no further here than its start weights, because its data was refused, say."""
    made_before_training = {"run.json", "init", "preference_pairs"}
    started = any(p.name.removeprefix(".") not in made_before_training for p in directory.iterdir())
    return not started and _foreign(directory, directory / "run.json", recipe) is not None


def _foreign(directory: Path, record: Path, recipe: Any) -> str | None:
    """Why the directory is not this recipe's own earlier attempt, or None if it is."""
    if not record.is_file():
        return "the directory is not empty and holds no run"
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["recipe_hash"] == recipe_hash(recipe):
            return None
        changes = recipe_differences(dict(found["identity"]), _identity(recipe))
    except (ValueError, KeyError, TypeError):
        return "run.json there is not readable"
    shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more keys" if len(changes) > 3 else "")
    return f"it holds another run ({shown})"


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
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines: text may hold U+2028
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)

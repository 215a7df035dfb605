"""The run directory: whose it is, which recipe's run lies in it, and what may be deleted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dots_align import __version__
from dots_align.config import Section, recipe_dict, recipe_differences
from dots_align.runtime import now, on_main, world_size, write_json


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

"""What a stage does each time it has saved: the hooks of `on_save:`, the links `last` and `best`, dropping old ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dots_align.checkpoint import PREFIX, checkpoints, evaluation_of, link, manifest_for, step_of
from dots_align.config import HookSection
from dots_align.evals.hooks import Background, HookResult, SaveHook, run_here
from dots_align.runtime import MetricsLog, barrier, gather_objects, is_main_process, logger, on_main, world_size

RECORD = "hooks.jsonl"
STOP = "stop_early"
Mode = Literal["max", "min"]


@dataclass
class Publisher:
    """The checkpoints of a run, and what is done with each. Every process of a launch has one and calls it alike."""

    run_dir: Path
    recipe: Any
    data_hash: str
    hooks: list[SaveHook]
    background: Background = field(default_factory=Background)

    def final_path(self, step: int) -> Path:
        return self.run_dir / f"{PREFIX}{step}"

    def manifest(self, step: int) -> dict[str, Any]:
        return manifest_for(self.recipe, step, self.data_hash)

    @property
    def stopped(self) -> bool:
        """Whether `stop_early` has ended the run, now or before it was resumed."""
        asked = any(section.hook == STOP for section in self.recipe.on_save)
        return asked and on_main(lambda: any(line["hook"] == STOP for line in _records(self.run_dir)))

    def after_publish(self, checkpoint: Path, log: MetricsLog) -> None:
        """Runs the hooks on a published checkpoint, or puts them in line, and logs what the finished ones found."""
        link(self.run_dir, "last", checkpoint)
        self._run(checkpoint, self.hooks, log)
        self._take_in(log, wait=False)

    def finish(self, log: MetricsLog) -> None:
        """Waits for the hooks that are still in line, each no longer than its time."""
        self._take_in(log, wait=True)

    def finish_hooks(self, newest: Path, log: MetricsLog) -> None:
        """Runs, on checkpoints up to `newest`, the hooks that a process which died left undone."""
        found = on_main(lambda: [(c, _done_at(self.run_dir, step_of(c))) for c in checkpoints(self.run_dir)])
        for checkpoint, done in found:
            if step_of(checkpoint) <= step_of(newest):
                self._run(checkpoint, [hook for hook in self.hooks if hook.name not in done], log)
        self._take_in(log, wait=False)

    def _run(self, checkpoint: Path, hooks: list[SaveHook], log: MetricsLog) -> None:
        step = step_of(checkpoint)
        for hook in hooks:
            if not hook.section.in_trainer:
                if is_main_process():
                    self.background.start(hook, checkpoint, self.recipe, step)
                continue
            result = None
            if hook.everywhere or is_main_process():
                result = run_here(hook, checkpoint, self.recipe, step, self._seconds(hook))
            results = [found for found in gather_objects(result) if found is not None]
            self._record(next((r for r in results if r.status != "done"), results[0]), log)

    def _seconds(self, hook: SaveHook) -> float | None:
        """The time a hook has in the trainer. One in which all processes take part cannot be broken off in one of
        them: the others would wait for it; what it calls has limits of its own. For any other one they wait at a
        barrier, and must not give up.
        """
        if world_size() == 1:
            return hook.section.timeout_seconds
        if hook.everywhere:
            return None
        return min(hook.section.timeout_seconds, 0.8 * 60 * self.recipe.parallel.timeout_minutes)

    def _record(self, result: HookResult, log: MetricsLog) -> None:
        failed = result.status != "done"
        if failed:
            told = f"on_save hook {result.hook} {result.status.replace('_', ' ')} on {PREFIX}{result.step}"
            logger.error("%s: %s", told, result.error)
        log.log_hook(result.step, result.record())
        if values := {**result.metrics, **({f"on_save/{result.hook}_failed": 1.0} if failed else {})}:
            log.log(result.step, values)

    def _take_in(self, log: MetricsLog, wait: bool) -> None:
        if is_main_process():
            for result in self.background.results(wait):
                self._record(result, log)
            self._stop_early(log)
            best = ranked(self.run_dir, *self._measure())
            if best:
                link(self.run_dir, "best", best[0])
            self._drop_old(best)
        barrier()

    def _stop_early(self, log: MetricsLog) -> None:
        records = _records(self.run_dir)
        if any(line["hook"] == STOP for line in records):
            return
        for section in (hook for hook in self.recipe.on_save if hook.hook == STOP):
            found = history(records, section.metric)
            if found and no_longer_improves(list(found.values()), section):
                reason = f"{section.metric} was no better in the last {section.patience} evaluations"
                logger.info("%s: stopped early: %s", self.recipe.stage, reason)
                log.log_hook(max(found), {"hook": STOP, "status": "done", "metrics": {}, "reason": reason})

    def _measure(self) -> tuple[str, Mode]:
        section = self._keep_best()
        if section is not None:
            return section.metric, section.mode
        return ("eval/accuracy" if self.recipe.stage == "reward_model" else "eval/exact_match"), "max"

    def _keep_best(self) -> HookSection | None:
        return next((hook for hook in self.recipe.on_save if hook.hook == "keep_best"), None)

    def _drop_old(self, best: list[Path]) -> None:
        section, limit = self._keep_best(), self.recipe.save.save_total_limit
        if section is not None:
            limit = limit or 1
        if limit is None:
            return
        kept = {*best[: section.keep if section else 1], *self.background.checkpoints()}
        self._delete_hidden()
        for checkpoint in checkpoints(self.run_dir)[:-limit]:
            if checkpoint not in kept:
                # Renamed first: a process that dies while deleting leaves no damaged checkpoint behind.
                checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.deleted"))
        self._delete_hidden()

    def _delete_hidden(self) -> None:
        """What dropped checkpoints are, and what is left of them where a process died here; as far as it can be deleted
        now: a network file system keeps what somebody still reads.
        """
        for doomed in self.run_dir.glob(f".{PREFIX}*.deleted"):
            shutil.rmtree(doomed, ignore_errors=True)


def _records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / RECORD
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def _done_at(run_dir: Path, step: int) -> set[str]:
    return {line["hook"] for line in _records(run_dir) if line["step"] == step}


def history(records: list[dict[str, Any]], metric: str) -> dict[int, float]:
    """The values that hooks found for a metric, by step in rising order."""
    found = {line["step"]: line["metrics"][metric] for line in records if metric in line["metrics"]}
    return dict(sorted(found.items()))


def no_longer_improves(values: list[float], section: HookSection) -> bool:
    """Whether none of the last `patience` values is better, by more than `min_delta`, than the best before them."""
    sign = 1 if section.mode == "max" else -1
    signed = [sign * value for value in values]
    before, recent = signed[: -section.patience], signed[-section.patience :]
    return bool(before) and max(recent) <= max(before) + section.min_delta


def ranked(run_dir: Path, metric: str = "eval/exact_match", mode: Mode = "max") -> list[Path]:
    """The checkpoints that have this metric, best first (of equals the newest): as a hook found it, or in their
    `eval.json`.
    """
    found = history(_records(run_dir), metric)
    scored = []
    for checkpoint in checkpoints(run_dir):
        own = {f"eval/{name}": value for name, value in evaluation_of(checkpoint).items()}
        score = found.get(step_of(checkpoint), own.get(metric))
        if score is not None:
            scored.append((score if mode == "max" else -score, step_of(checkpoint), checkpoint))
    return [checkpoint for _, _, checkpoint in sorted(scored, reverse=True)]

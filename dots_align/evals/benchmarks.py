"""Tasks on a loaded checkpoint: asked, scored, summed up. What was asked is kept line by line, so that a run that was
killed goes on, and what was done for the same checkpoint, task and sampling is not done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dots_align.config import explain
from dots_align.data.sources import data_hash
from dots_align.evals.answers import Ask, answers
from dots_align.evals.likelihood import likelihoods
from dots_align.evals.statistics import mean_interval, pass_at_k, powers_of_two
from dots_align.evals.task import Item, TaskSection, load_items, load_task, prompt_ids
from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.engine import RolloutEngine
from dots_align.runtime import barrier, logger, on_main, progress, rank, world_size, write_json
from dots_align.scoring import RewardSum
from dots_align.types import Prompt, Response, SamplingParams

JUDGE = "reward_models.judge:"  # scorers that ask another model


@dataclass(frozen=True)
class Suite:
    """Tasks, and where their data lies. `limit`: at most so many records of each. `judge`: `base_url` and `model` of
    the endpoint that grades what only a model can. `changes`: sampling keys in place of the tasks' own.
    """

    names: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None
    hub: bool = False
    num_shots: int | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    judge: tuple[tuple[str, str], ...] = ()

    def tasks(self) -> list[TaskSection]:
        """The tasks as they will be asked. Raises ValueError for one that does not exist, or cannot be so asked."""
        return [self._changed(load_task(name)) for name in self.names]

    def _changed(self, task: TaskSection) -> TaskSection:
        update: dict[str, Any] = {"scorers": {}}
        for name, section in task.scorers.items():
            if section.function.startswith(JUDGE) and "base_url" not in section.arguments:
                if not self.judge:
                    logger.warning("%s: no judge was given, `%s` is left out", task.name, name)
                    continue
                section = section.model_copy(update={"arguments": {**section.arguments, **dict(self.judge)}})
            update["scorers"][name] = section
        if task.scorers and task.metric not in update["scorers"]:
            update["metric"] = next(iter(update["scorers"]))
        if self.num_shots is not None:
            update["num_shots"] = self.num_shots
        update["sampling"] = {**task.sampling.model_dump(), **dict(self.changes)}
        try:
            return TaskSection.model_validate({**task.model_dump(), **update})
        except ValidationError as error:
            origins = {("sampling", name): f"{name}={value}" for name, value in self.changes}
            told = [explain(e, TaskSection, origins, Path(task.name)) for e in error.errors()]
            raise ValueError("\n".join(told)) from None


def run_suite(model: Any, tokenizer: Any, suite: Suite, checkpoint_id: str, directory: Path) -> dict[str, Any]:
    """Runs tasks on a model; every process of a launch calls it, of a sharded model each answers its share.

    Args:
        checkpoint_id: what tells these weights from others (`checkpoint.fingerprint`).
        directory: gets, for each task, `<task>-<key>.json` and `.items.jsonl`.

    Returns:
        by task its `metrics`, each a `value` with `low` and `high`, the ends of its 95 % interval, and what was asked.
    """
    found = {}
    on_main(lambda: directory.mkdir(parents=True, exist_ok=True))
    # All data is read before anything is asked: what is wrong with the last task's should not show after hours.
    asked = [(task, load_items(task, suite.data, tokenizer, suite.limit, suite.hub)) for task in suite.tasks()]
    for task, items in asked:
        with _alone(directory):
            found[task.name] = _run(model, tokenizer, task, items, checkpoint_id, directory)
    return found


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of several evaluations of a checkpoint one asks; the others wait, and find what it was answered."""
    if rank() > 0:
        yield
        return
    held = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # where the file system has no locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: another evaluation is at work here, waiting for it", directory)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _run(
    model: Any, tokenizer: Any, task: TaskSection, items: list[Item], checkpoint_id: str, directory: Path
) -> dict[str, Any]:
    identity = _identity(task, items, checkpoint_id, str(next(model.parameters()).dtype))
    stem = directory / f"{task.name}-{identity['key']}"
    result = stem.with_name(f"{stem.name}.json")
    if cached := on_main(lambda: json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None):
        logger.info("%s: asked before, see %s", task.name, result)
        return {**cached, "cached": True}
    started = time.monotonic()
    lines = _Lines(stem, len(items))
    done = on_main(lines.collect)
    stride = world_size() if is_sharded(model) else 1
    mine = [index for index in range(len(items)) if index not in done][rank() % stride :: stride]
    ask = _asked if task.kind == "generate" else _chosen
    if stride > 1 or rank() == 0:
        with progress(len(mine), task.name, "items") as bar:
            lines.write(ask(model, tokenizer, task, items, mine), bar)
    barrier()
    return on_main(lambda: _finish(task, items, lines, identity, result, time.monotonic() - started))


def _identity(task: TaskSection, items: list[Item], checkpoint_id: str, dtype: str) -> dict[str, Any]:
    about = task.model_dump(mode="json", exclude={"about", "example", "metric", "data", "shots", "rename"})
    identity = {"checkpoint": checkpoint_id, "dtype": dtype, "task": about, "data_hash": data_hash(items)}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return {"key": hashlib.sha256(text.encode()).hexdigest()[:12], **identity}


class _Lines:
    """What was answered so far, a line of JSON an item; every process appends to a file of its own."""

    def __init__(self, stem: Path, count: int) -> None:
        self.stem, self.count = stem, count
        self.own = stem.with_name(f".{stem.name}.part-{rank()}.jsonl")

    def paths(self) -> list[Path]:
        return sorted(self.stem.parent.glob(f".{self.stem.name}.part-*.jsonl"))

    def read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for path in self.paths():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # half a line, and maybe half a character, of a process that was killed
                found[record["index"]] = record
        return found

    def collect(self) -> set[int]:
        """The items that are done; of files of other processes, and without torn lines, one is made."""
        found, whole = self.read(), self.own.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(found[i], ensure_ascii=False) + "\n" for i in sorted(found)), "utf-8")
        whole.replace(self.own)
        for path in self.paths():
            if path != self.own:
                path.unlink()
        return set(found)

    def write(self, records: Iterator[dict[str, Any]], bar: Any) -> None:
        with self.own.open("a", encoding="utf-8") as out:
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                out.flush()
                bar.update()


def _asked(
    model: Any, tokenizer: Any, task: TaskSection, items: Sequence[Item], mine: list[int]
) -> Iterator[dict[str, Any]]:
    keys, asks = task.sampling, []
    for index in mine:
        sampling = SamplingParams(
            temperature=keys.temperature, top_p=keys.top_p, max_tokens=keys.max_tokens, seed=(keys.seed << 32) + index
        )
        asks.append(Ask(prompt_ids(tokenizer, task, items[index]), sampling, keys.num_samples, keys.stop))
    for place, found in answers(RolloutEngine(model), tokenizer, asks):
        told = {"error": found} if isinstance(found, str) else {"answers": [asdict(answer) for answer in found]}
        yield {"index": mine[place], **told}


def _chosen(
    model: Any, tokenizer: Any, task: TaskSection, items: Sequence[Item], mine: list[int]
) -> Iterator[dict[str, Any]]:
    context = model.config.max_position_embeddings
    questions, places = [], []
    for index in mine:
        asked, choices = continued(tokenizer, prompt_ids(tokenizer, task, items[index]), items[index].choices)
        longest = len(asked) + max(map(len, choices)) - 1
        if longest > context:
            yield {"index": index, "error": f"{longest} tokens are more than the context of {context}"}
        else:
            questions.append((asked, choices))
            places.append(index)
    for place, found in likelihoods(model, questions):
        yield {"index": places[place], "likelihoods": [asdict(likelihood) for likelihood in found]}


def continued(tokenizer: Any, prompt: list[int], choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The ids of texts that continue a prompt. They are tokenized alone: a byte-level tokenizer never joins a word to
    what is before its space, and behind a chat's last special token nothing can be joined.
    """
    return prompt, [list(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in choices]


def _finish(
    task: TaskSection, items: Sequence[Item], lines: _Lines, identity: dict[str, Any], result: Path, seconds: float
) -> dict[str, Any]:
    """Scores what was answered, writes it down and sums it up."""
    records = lines.read()
    ordered = [records[index] for index in range(len(items))]
    score = _score_answers if task.kind == "generate" else _score_choices
    scored, num_scorer_errors = score(task, items, ordered)
    summary = {
        "task": task.name,
        "metric": task.metric,
        "metrics": summed_up(task, scored),
        "groups": _by_group(task, items, scored),
        "num_items": len(items),
        "num_errors": sum("error" in record for record in ordered),
        "num_scorer_errors": num_scorer_errors,
        "num_shots": task.num_shots,
        "seconds": round(seconds, 1),
        "identity": identity,
    }
    shown = result.with_name(f"{result.name.removesuffix('.json')}.items.jsonl")
    with shown.open("w", encoding="utf-8") as out:
        for item, record, scores in zip(items, ordered, scored, strict=True):
            asked = {"source": item.source, "group": item.group, "prompt": item.prompt}
            right = {"choices": item.choices, "gold": item.gold} if item.choices else {"reference": item.reference}
            out.write(json.dumps({**record, **asked, **right, "scores": scores}, ensure_ascii=False) + "\n")
    write_json(result, summary)
    for path in lines.paths():
        path.unlink()
    return summary


def _score_answers(
    task: TaskSection, items: Sequence[Item], records: list[dict[str, Any]]
) -> tuple[list[dict[str, list[float]]], int]:
    """By item and scorer the score of each sample; what could not be asked counts as 0."""
    responses, owners = [], []
    for index, record in enumerate(records):
        prompt = Prompt(list(items[index].messages), items[index].reference, items[index].source)
        for found in record.get("answers", []):
            responses.append(Response(prompt, found["text"], [0] * found["num_tokens"], found["finish_reason"]))
            owners.append(index)
    names = list(task.scorers)
    sections = [section.model_copy(update={"name": name}) for name, section in task.scorers.items()]
    with RewardSum(sections) as scorer:
        values = scorer.score(responses) if responses else []
    scored: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in records]
    for index, (_, by_name) in zip(owners, values, strict=True):
        for name in names:
            scored[index][name].append(by_name[name])
    for scores, record in zip(scored, records, strict=True):
        if "error" in record:
            scores.update({name: [0.0] * task.sampling.num_samples for name in names})
            continue
        found = record["answers"]
        scores["stop_rate"] = [float(answer["finish_reason"] == "stop") for answer in found]
        scores["mean_length"] = [float(answer["num_tokens"]) for answer in found]
    return scored, scorer.num_errors


def _score_choices(
    task: TaskSection, items: Sequence[Item], records: list[dict[str, Any]]
) -> tuple[list[dict[str, list[float]]], int]:
    scored = []
    for item, record in zip(items, records, strict=True):
        if "error" in record:
            scored.append({task.metric: [0.0]})
            continue
        found = record["likelihoods"]
        if task.kind == "loss":
            loss = -found[0]["logprob"]
            tokens, size = found[0]["num_tokens"], len(item.choices[0].encode())
            scored.append(
                {
                    "accuracy": [float(found[0]["greedy"])],
                    "loss": [loss],
                    "loss_per_token": [loss / tokens],
                    "bits_per_byte": [loss / math.log(2) / size],
                }
            )
            continue
        plain = [f["logprob"] for f in found]
        by_length = [f["logprob"] / len(choice) for f, choice in zip(found, item.choices, strict=True)]
        place = sum(value > plain[item.gold] for value in plain)
        scored.append(
            {
                "accuracy": [float(plain.index(max(plain)) == item.gold)],
                "accuracy_by_length": [float(by_length.index(max(by_length)) == item.gold)],
                "reciprocal_rank": [1 / (1 + place)],
            }
        )
    return scored, 0


def summed_up(task: TaskSection, scored: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Each score's mean over items with its interval, and pass@k where there are several samples."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for scores in scored for name in scores):
        means = [math.fsum(scores[name]) / len(scores[name]) for scores in scored if scores.get(name)]
        found[name] = dict(zip(("value", "low", "high"), mean_interval(means), strict=True))
    if task.kind == "loss" and "loss" in found:
        found["perplexity"] = {key: math.exp(min(value, 700)) for key, value in found["loss"].items()}
    samples = task.sampling.num_samples
    for name in task.scorers if samples > 1 else ():
        for k in powers_of_two(samples):
            right = [sum(value >= 1 for value in scores[name]) for scores in scored]
            passed = [pass_at_k(samples, count, k) for count in right]
            found[f"{name}_pass@{k}"] = dict(zip(("value", "low", "high"), mean_interval(passed), strict=True))
    return found


def _by_group(
    task: TaskSection, items: Sequence[Item], scored: Sequence[dict[str, list[float]]]
) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = {}
    for item, scores in zip(items, scored, strict=True):
        values = scores[task.metric]
        groups.setdefault(item.group, []).append(math.fsum(values) / len(values))
    if set(groups) == {""}:
        return {}
    return {name: {"value": math.fsum(v) / len(v), "num_items": len(v)} for name, v in sorted(groups.items())}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as lines for people: each task's own metric in percent (a loss as it is) with its interval."""
    rows = [("task", "metric", "value", "95 % interval", "items", "errors")]
    for name, result in results.items():
        metric = result["metrics"][result["metric"]]
        scale = 1 if result["metric"].startswith(("loss", "perplexity", "bits")) else 100
        low, high = (f"{scale * metric[key]:.1f}" for key in ("low", "high"))
        value, errors = f"{scale * metric['value']:.1f}", result["num_errors"] + result["num_scorer_errors"]
        rows.append((name, result["metric"], value, f"{low} to {high}", str(result["num_items"]), str(errors)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

"""What a run keeps of its rollouts in a checkpoint: prompts in work, and a batch that was made ahead. JSON lines, with
arrays of numbers as base64 of their bytes, so that everything comes back bit for bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dots_align.runtime import gather_objects, is_main_process
from dots_align.stages.rollouts import Group, Member, Rollouts
from dots_align.stages.update import is_mine
from dots_align.types import Sample, Trajectory

FILE = "rollouts.jsonl"
_IDS, _LOGPROBS = "<i4", "<f8"


def save_rollouts(directory: Path, groups: list[Group], ahead: Rollouts | None) -> None:
    """Writes prompts in work and the batch made ahead, if there are any; every process brings its own, collective."""
    own = [_group_record(g) for g in groups if is_mine(g.position)]
    header = []
    if ahead is not None:
        header = [{"kind": "batch", "metrics": ahead.metrics, "samples": ahead.samples}]
        own += [record for record in _batch_records(ahead) if is_mine(record["group"])]
    everyones = [record for part in gather_objects(own) for record in part]
    if is_main_process() and (header or everyones):
        with (directory / FILE).open("w", encoding="utf-8") as out:
            for record in [*header, *everyones]:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")


def load_rollouts(directory: Path) -> tuple[list[Group], Rollouts | None]:
    """What `save_rollouts` wrote, on any number of processes; nothing where it wrote nothing."""
    records = list(_records(directory / FILE))
    groups = [_group(record) for record in records if record["kind"] == "group"]
    header = next((record for record in records if record["kind"] == "batch"), None)
    ahead = None if header is None else _batch(header, [r for r in records if r["kind"] == "trajectory"])
    return sorted(groups, key=lambda g: g.position), ahead


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _group_record(group: Group) -> dict[str, Any]:
    return {
        "kind": "group",
        "position": group.position,
        "index": group.index,
        "since": group.since,
        "ended": group.ended,
        "members": [
            {
                "response_ids": _packed(m.sample.response_ids, _IDS),
                "rollout_logprobs": _packed(m.sample.rollout_logprobs, _LOGPROBS),
                "logprobs": _packed(m.sample.logprobs, _LOGPROBS),
                "finish_reason": m.sample.finish_reason,
                "routes": _text(m.sample.routes),
                "policies": m.policies,
                "score": m.score,
            }
            for m in group.members
        ],
    }


def _group(record: dict[str, Any]) -> Group:
    position = record["position"]
    members = tuple(map(_member, record["members"])) if is_mine(position) else ()
    return Group(position, record["index"], record["since"], members, record["ended"])


def _member(record: dict[str, Any]) -> Member:
    sample = Sample(
        _unpacked(record["response_ids"], _IDS),
        _unpacked(record["rollout_logprobs"], _LOGPROBS),
        _unpacked(record["logprobs"], _LOGPROBS),
        record["finish_reason"],
        _bytes(record["routes"]),
    )
    policies = tuple((version, count) for version, count in record["policies"])
    return Member(sample, policies, record["score"] and (record["score"][0], record["score"][1]))


def _batch_records(rollouts: Rollouts) -> Iterator[dict[str, Any]]:
    baselines = rollouts.baselines or [None] * len(rollouts.trajectories)
    for number, (t, baseline) in enumerate(zip(rollouts.trajectories, baselines, strict=True)):
        yield {
            "kind": "trajectory",
            "number": number,
            "prompt_ids": _packed(t.prompt_ids, _IDS),
            "response_ids": _packed(t.response_ids, _IDS),
            "rollout_logprobs": _packed(t.rollout_logprobs, _LOGPROBS),
            "group": t.group,
            "reward": t.reward,
            "routes": _text(t.routes),
            "response_mask": t.response_mask,
            "baseline": baseline,
        }


def _batch(header: dict[str, Any], records: list[dict[str, Any]]) -> Rollouts:
    ordered = sorted(records, key=lambda record: record["number"])
    baselines = [record["baseline"] for record in ordered]
    trajectories = [
        Trajectory(
            _unpacked(r["prompt_ids"], _IDS),
            _unpacked(r["response_ids"], _IDS),
            _unpacked(r["rollout_logprobs"], _LOGPROBS),
            r["group"],
            r["reward"],
            _bytes(r["routes"]) if is_mine(r["group"]) else None,
            r["response_mask"],
        )
        for r in ordered
    ]
    samples = [(place, shown) for place, shown in header["samples"]]
    return Rollouts(trajectories, None if None in baselines else baselines, header["metrics"], samples)


def _packed(values: Iterable[float], dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def _unpacked(text: str, dtype: str) -> list:
    return np.frombuffer(base64.b64decode(text), dtype).tolist()


def _text(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)

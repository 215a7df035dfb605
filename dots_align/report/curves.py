"""metrics.jsonl and router.jsonl as series the page can draw: resumes undone, long series thinned, panels chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dots_align.report.reading import as_number

MAX_POINTS = 2_000  # per series
MAX_SNAPSHOTS = 200  # positions of the expert-load slider
MAX_LOADS = 400_000  # numbers in all snapshots of one stage: about 3 MB of page

# Headline panels: (title, drawn as a percentage, patterns for the name behind `<stage>/`).
# Of the patterns the first with a hit wins.
PANELS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("Loss", False, (r"loss|eval_loss", r"\w+_loss")),
    (
        "Reward",
        False,
        (r"reward|reward[_/]mean|mean_reward", r"rewards/(chosen|rejected|margins)", r"rewards?/.+"),
    ),
    ("Accuracy", True, (r"exact_match|accuracy|accuracies|rewards/accuracies|mean_token_accuracy|token_accuracy",)),
    (
        "Response length (tokens)",
        False,
        (r"(\w+/)?(mean_)?(response_|completion_)?(mean_)?length([_/]mean)?",),
    ),
)
AGREEMENT = "Train/rollout agreement"


@dataclass
class Series:
    """One metric. `steps` and `values` have the same length; a value is None where the run logged a non-finite number.
    `total` counts the points before thinning."""

    steps: list[int]
    values: list[float | None]
    total: int


@dataclass
class Panel:
    """A chart (headline) or a group of single-series charts (all metrics), by series name."""

    title: str
    names: list[str]
    percent: bool = False


@dataclass
class Curves:
    """What metrics.jsonl says. `seconds` adds up the time of every resume; `last_step` is None before any."""

    series: dict[str, Series] = field(default_factory=dict)
    seconds: float | None = None
    last_step: int | None = None


@dataclass
class Router:
    """Expert load over a run: `violation` for every line of the file, `loads` (step -> [layers][experts]) thinned."""

    layers: list[int]
    steps: list[int]
    loads: list[list[list[float]]]
    violation: dict[str, Series]
    total: int


def read_curves(records: Iterable[dict[str, Any]], notices: list[str], label: str) -> Curves:
    """Series from metrics lines; after a resume the abandoned steps are replaced by the ones that counted."""
    points: dict[str, dict[int, float | None]] = {}
    curves, clock, earlier_seconds = Curves(), None, 0.0
    for record in records:
        step, time = record["step"], as_number(record.get("time"))
        is_training = any(
            name not in ("step", "time") and not name.startswith(("eval/", "on_save/")) for name in record
        )
        if time is not None and is_training:
            if clock is not None and time < clock:  # the clock starts again at a resume
                earlier_seconds += clock
                _drop_from(points, step)
            clock = time
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, {})[step] = as_number(value)
    for name, values in sorted(points.items()):
        _note_gaps(name, values, notices, label)
        curves.series[name] = thin(sorted(values.items()))
    curves.seconds = None if clock is None else earlier_seconds + clock
    curves.last_step = max((step for values in points.values() for step in values), default=None)
    return curves


def _drop_from(points: dict[str, dict[int, float | None]], step: int) -> None:
    for values in points.values():
        for abandoned in [at for at in values if at >= step]:
            del values[abandoned]


def _note_gaps(name: str, values: dict[int, float | None], notices: list[str], label: str) -> None:
    gaps = [step for step, value in sorted(values.items()) if value is None]
    if gaps:
        notices.append(f"{label}: {name} was not a finite number at {len(gaps)} step(s), first at step {gaps[0]}.")


def thin(points: list[tuple[int, float | None]]) -> Series:
    """At most MAX_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    kept = points
    if len(points) > MAX_POINTS:
        buckets = MAX_POINTS // 2 - 1  # the first and the last point are always kept
        inner = [(step, value) for step, value in points[1:-1] if value is not None]
        kept = [points[0]]
        for index in range(buckets):
            stretch = inner[index * len(inner) // buckets : (index + 1) * len(inner) // buckets]
            if stretch:
                kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
        kept.append(points[-1])
    values = [None if value is None else float(f"{value:.6g}") for _, value in kept]
    return Series([step for step, _ in kept], values, len(points))


def choose_panels(series: Mapping[str, Series]) -> tuple[list[Panel], list[Panel]]:
    """(headline panels, groups of every other metric) for the metrics of one stage."""
    names = sorted(series)
    headline = []
    for title, percent, patterns in PANELS:
        hits: list[str] = []
        for pattern in patterns:
            hits = hits or [name for name in names if re.fullmatch(pattern, name.partition("/")[2] or name)]
        if hits:
            hits.sort(key=lambda name: name.startswith("eval/"))
            headline.append(Panel(title, hits, percent and all(_is_share(series[name]) for name in hits)))
    shown = {name for panel in headline for name in panel.names}
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in shown:
            groups.setdefault(_group(name), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: (item[0] != AGREEMENT, item[0]))
    return headline, [Panel(title, members) for title, members in ordered]


def _is_share(series: Series) -> bool:
    return all(0 <= value <= 1 for value in series.values if value is not None)


def _group(name: str) -> str:
    room, _, tail = name.partition("/")
    return AGREEMENT if tail.startswith("agreement_") else (room if tail else "other")


def read_router(records: Iterable[dict[str, Any]], notices: list[str], label: str) -> Router | None:
    """Expert load per layer; None where the run routed nothing (or logged nothing yet)."""
    by_step: dict[int, tuple[list[int], list[list[float]]]] = {}
    misshapen = 0
    for record in records:
        step, loads = record["step"], _loads(record)
        if loads is None:
            misshapen += 1
            continue
        if by_step and step < max(by_step):  # a resume went back: what came after it was abandoned
            by_step = {at: value for at, value in by_step.items() if at < step}
        by_step[step] = loads
    if misshapen:
        notices.append(f"{label}: left out {misshapen} line(s) whose load is not a table of layers x experts.")
    if not by_step:
        return None
    layers, latest = by_step[max(by_step)]
    shape = (layers, len(latest[0]))
    history = [(step, load) for step, (at, load) in sorted(by_step.items()) if (at, len(load[0])) == shape]
    return _router(layers, history)


def _router(layers: list[int], history: list[tuple[int, list[list[float]]]]) -> Router:
    worst = [(step, max(map(max_violation, load))) for step, load in history]
    mean = [(step, sum(map(max_violation, load)) / len(load)) for step, load in history]
    size = len(layers) * len(history[0][1][0])
    room = min(len(history), MAX_SNAPSHOTS, max(2, MAX_LOADS // size))
    kept = [history[round(index * (len(history) - 1) / max(1, room - 1))] for index in range(room)]
    kept[-1] = history[-1]
    loads = [[[float(f"{share:.4g}") for share in row] for row in load] for _, load in kept]
    violation = {"worst layer": thin(list(worst)), "mean of layers": thin(list(mean))}
    return Router(layers, [step for step, _ in kept], loads, violation, len(history))


def _loads(record: dict[str, Any]) -> tuple[list[int], list[list[float]]] | None:
    """(layers, load) of a router line, or None unless it is a full rectangle of finite numbers."""
    layers, table = record.get("layers"), record.get("load")
    if not isinstance(layers, list) or not isinstance(table, list) or not layers or len(layers) != len(table):
        return None
    if any(not isinstance(row, list) or not row or len(row) != len(table[0]) for row in table):
        return None
    load = [[as_number(share) for share in row] for row in table]
    if any(share is None for row in load for share in row):
        return None
    return layers, [[share or 0.0 for share in row] for row in load]


def max_violation(row: list[float]) -> float:
    """max load / mean load - 1: 0 is perfect balance, 1 means the busiest expert does twice its share."""
    mean = sum(row) / len(row)
    return max(row) / mean - 1 if mean > 0 else 0.0

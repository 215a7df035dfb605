"""metrics.jsonl and router.jsonl as series the page can draw: resumes undone, long series thinned."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dots_align.report.reading import as_number
from dots_align.report.samples import Blobs

MAX_POINTS = 1_600  # per series
MAX_SNAPSHOTS = 240  # positions of the expert-load slider
MAX_LOADS = 1_000_000  # numbers in all snapshots of one stage, two bytes each


@dataclass
class Series:
    """One metric. `steps` and `values` have the same length; a value is None where the run logged a non-finite number.
    `total` counts the points before thinning."""

    steps: list[int]
    values: list[float | None]
    total: int


@dataclass
class Curves:
    """What metrics.jsonl says. `points` are all there are, `series` those that are drawn; `seconds` adds up the time of
    every resume; `last_step` is None before any.
    """

    points: dict[str, list[tuple[int, float | None]]] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    seconds: float | None = None
    last_step: int | None = None


@dataclass
class Router:
    """Expert load over a run: `violation` for every line of the file, the loads themselves of the `steps` kept.

    `loads` names the blob of uint16 [step][layer][expert], each a share of its layer's slots in 65535ths.
    """

    layers: list[int]
    experts: int
    steps: list[int]
    loads: str
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
        curves.points[name] = sorted(values.items())
        curves.series[name] = thin(curves.points[name])
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


def read_router(records: Iterable[dict[str, Any]], notices: list[str], label: str, blobs: Blobs) -> Router | None:
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
    return _router(layers, history, blobs)


def _router(layers: list[int], history: list[tuple[int, list[list[float]]]], blobs: Blobs) -> Router:
    worst = [(step, max(map(max_violation, load))) for step, load in history]
    mean = [(step, sum(map(max_violation, load)) / len(load)) for step, load in history]
    size = len(layers) * len(history[0][1][0])
    room = min(len(history), MAX_SNAPSHOTS, max(2, MAX_LOADS // size))
    kept = [history[round(index * (len(history) - 1) / max(1, room - 1))] for index in range(room)]
    kept[-1] = history[-1]
    shares = array("H", (min(65535, round(65535 * max(0.0, s))) for _, load in kept for row in load for s in row))
    if sys.byteorder == "big":
        shares.byteswap()
    violation = {"worst layer": thin(list(worst)), "mean of layers": thin(list(mean))}
    steps = [step for step, _ in kept]
    return Router(layers, len(history[0][1][0]), steps, blobs.add(shares.tobytes()), violation, len(history))


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

"""What there is to look at after a run, and how the run went by its own measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from dots_align.report.reading import as_number

Points = list[tuple[int, float | None]]
WINDOW = 5  # steps over which a figure has to hold before it counts


@dataclass(frozen=True)
class Finding:
    """One cause. `series` are the metrics that show it, `first_step` the step at which it began (None: all along)."""

    cause: str
    title: str
    evidence: list[str]
    advice: str
    series: list[str] = field(default_factory=list)
    first_step: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run went by its own measure: `better`, `flat`, `worse`, `broken` (no numbers) or `unknown` (too short).

    `start`, `best`, `end` are medians over a few steps; `since` is the step from which on it was worse.
    """

    verdict: str
    measure: str = ""
    start: float = 0.0
    best: float = 0.0
    end: float = 0.0
    since: int | None = None


@dataclass(frozen=True)
class Case:
    """What there is to look at. `points` by full metric name, without thinning; `samples` as in samples.jsonl."""

    kind: str
    points: dict[str, Points]
    recipe: dict[str, Any]
    samples: Sequence[dict[str, Any]] = ()

    def series(self, name: str) -> list[tuple[int, float]]:
        """The finite values of `<kind>/<name>`."""
        return [(step, value) for step, value in self.points.get(f"{self.kind}/{name}", []) if value is not None]

    def key(self, path: str) -> float | None:
        """A number of the recipe."""
        value: Any = self.recipe
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return as_number(value)


def outcome(case: Case) -> Outcome:
    """By the reward where there is one, else the loss (which has to fall), else held-out exact match."""
    if bad := not_finite(case):
        return Outcome("broken", bad[0][0], since=bad[0][1])
    for name, sign in (("reward", 1), ("rewards/accuracies", 1), ("loss", -1)):
        if len(points := case.series(name)) >= 2 * WINDOW:
            return _judge(f"{case.kind}/{name}", points, sign)
    return Outcome("unknown")


def _judge(measure: str, points: list[tuple[int, float]], sign: int) -> Outcome:
    values = [sign * value for _, value in points]
    smooth, few = rolling(values), max(WINDOW, len(values) // 10)
    start, end, best = median(values[:few]), median(values[-few:]), max(smooth)
    noise = max(median(abs(a - b) for a, b in pairwise(values)), 0.02 * max(map(abs, smooth)))
    found = sign * start, sign * best, sign * end
    lost = best - end
    if lost > 3 * noise and (lost > 0.3 * (best - min(smooth)) or end < start - noise):
        top = max(index for index, value in enumerate(smooth) if value >= best - 0.2 * lost)
        return Outcome("worse", measure, *found, since=points[min(top + 1, len(points) - 1)][0])
    return Outcome("better" if end - start > noise else "flat", measure, *found)


def rolling(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The median of each value and the `window` - 1 before it."""
    return [median(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def not_finite(case: Case) -> list[tuple[str, int]]:
    """(metric, first step) of training metrics that were no number, earliest first."""
    prefix = f"{case.kind}/"
    bad = [
        (name, next(step for step, value in points if value is None))
        for name, points in case.points.items()
        if name.startswith(prefix) and any(value is None for _, value in points)
    ]
    return sorted(bad, key=lambda item: item[1])


def sustained(points: list[tuple[int, float]], holds: Callable[[float], bool]) -> int | None:
    """The first step from which on most of `WINDOW` steps (of all, where there are fewer) satisfy `holds`, or None.

    The last three steps are enough by themselves: what held there may be what ended the run.
    """
    if not points:
        return None
    flags = [holds(value) for _, value in points]
    need = min(WINDOW, len(flags))
    for index in range(len(flags) - need + 1):
        if flags[index] and 2 * sum(flags[index : index + need]) > need:
            return points[index][0]
    if len(flags) > 3 and all(flags[-3:]):
        return points[-3][0]
    return None


def before(points: list[tuple[int, float]], step: int) -> float:
    earlier = [abs(value) for at, value in points if at < step]
    return median(earlier) if earlier else 0.0


def fall(points: list[tuple[int, float]]) -> float:
    if len(points) < 2 * WINDOW:
        return 0.0
    return median(v for _, v in points[:WINDOW]) - median(v for _, v in points[-WINDOW:])


def consequence(went: Outcome) -> list[str]:
    if went.verdict != "worse":
        return []
    name = went.measure.partition("/")[2]
    return [f"the {name} went from {went.best:.3g} to {went.end:.3g}, from about step {went.since} on"]


def names_of(case: Case, *names: str) -> list[str]:
    return [full for name in names if (full := f"{case.kind}/{name}") in case.points]

"""Training curves of an export: read from the runs' metrics, drawn as one SVG beside the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FILE = "training.svg"
MAX_POINTS = 100
Curves = dict[str, list[list[float]]]
"""For each metric its points, [step, value]."""

_WIDTH, _HEIGHT, _MARGIN = 320, 170, 36


def read_curves(checkpoint: Path, stage: str, step: int) -> Curves:
    """The curves of the run that wrote a checkpoint, up to its step; empty if it left no metrics.jsonl that can be
    read: a card does without it.
    """
    wanted = (f"{stage}/loss", f"{stage}/reward", f"{stage}/rewards/accuracies", "eval/exact_match")
    found: Curves = {}
    for line in _lines(checkpoint.resolve().parent / "metrics.jsonl"):
        if not isinstance(line.get("step"), int) or line["step"] > step:
            continue
        for name in wanted:
            value = line.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append([line["step"], value])
    return {name: _thinned(points) for name, points in found.items() if len(points) > 1}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(record, dict):
            yield record


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most MAX_POINTS, each the mean of its neighbours, the last one as it is."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [[group[-1][0], float(f"{sum(v for _, v in group) / len(group):.5g}")] for group in groups]
    return [*means[:-1], points[-1]]


def draw(stages: list[tuple[str, Mapping[str, list[list[float]]]]]) -> str | None:
    """The SVG of all stages' curves, three in a row; None if there are none."""
    charts = [(f"{n}. {stage}: {name}", points) for n, (stage, c) in enumerate(stages, 1) for name, points in c.items()]
    if not charts:
        return None
    columns = min(3, len(charts))
    width, height = columns * _WIDTH, math.ceil(len(charts) / columns) * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" role="img"><title>Training curves</title>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, points) in enumerate(charts):
        row, column = divmod(number, columns)
        parts.append(f'<g transform="translate({column * _WIDTH} {row * _HEIGHT})">{_chart(title, points)}</g>')
    return "".join([*parts, "</svg>\n"])


def _chart(title: str, points: list[list[float]]) -> str:
    steps, values = zip(*points, strict=True)
    left, right, top, bottom = _MARGIN + 14, _WIDTH - 12, 26, _HEIGHT - 24
    low, high = min(values), max(values)

    def x(step: float) -> float:
        return left + (right - left) * (step - steps[0]) / max(steps[-1] - steps[0], 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / ((high - low) or 1.0)

    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return (
        f'<text x="{left}" y="16" fill="#222">{escape(title)}</text>'
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#bbb"/>'
        f'<text x="{left - 4}" y="{top + 4}" text-anchor="end" fill="#666">{high:.3g}</text>'
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end" fill="#666">{low:.3g}</text>'
        f'<text x="{right}" y="{bottom + 14}" text-anchor="end" fill="#666">step {steps[-1]:g}</text>'
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>'
    )

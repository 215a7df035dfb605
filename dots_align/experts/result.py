"""An analysis as plain values (for JSON and the page), as a table for the terminal, and in one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np

from dots_align.experts import measures
from dots_align.experts.analysis import Analysis, CheckpointLoad

ROWS = 10  # of specialists in the terminal


def as_values(analysis: Analysis) -> dict[str, Any]:
    """Loads are shares of a layer's slots, rows in the order of `layers`."""
    change = analysis.change
    return {
        "format": 1,
        "layers": analysis.layers,
        "num_experts": analysis.num_experts,
        "experts_per_token": analysis.experts_per_token,
        "domains": [{**vars(domain), "tokens": analysis.tokens[domain.name]} for domain in analysis.domains],
        "checkpoints": [_checkpoint(analysis, load) for load in analysis.checkpoints],
        "change": None if change is None else {name: _rounded(values) for name, values in vars(change).items()},
        "verdict": verdict(analysis),
    }


def _checkpoint(analysis: Analysis, load: CheckpointLoad) -> dict[str, Any]:
    share = load.shares
    names = list(load.counts)
    return {
        "name": load.name,
        "path": load.path,
        "step": load.step,
        "load": dict(zip(names, _rounded(share), strict=True)),
        "max_violation": dict(zip(names, _rounded(measures.max_violation(share)), strict=True)),
        "entropy": dict(zip(names, _rounded(measures.entropy(share)), strict=True)),
        "divergence": _rounded(measures.divergence(share)),
        "similarity": _rounded(measures.similarity(share)),
        "specialists": [
            {
                **vars(found),
                "layer": analysis.layers[found.layer],
                "domain": names[found.domain],
                "loads": _rounded(share[:, found.layer, found.expert] * analysis.num_experts),
            }
            for found in measures.specialists(share)
        ],
        "shifts": [
            {
                "from": one.other,
                "shift": {name: _rounded(values) for name, values in one.shift.items()},
                "overlap": {name: _rounded(values) for name, values in one.overlap.items()},
            }
            for one in load.shifts
        ],
    }


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values, 6).tolist()


def verdict(analysis: Analysis) -> str:
    """What to remember."""
    last = analysis.checkpoints[-1]
    share, names = last.shares, list(last.counts)
    violation = measures.max_violation(share)
    domain, row = np.unravel_index(violation.argmax(), violation.shape)
    busiest = (
        f"The busiest expert of layer {analysis.layers[row]} does {violation[domain, row] + 1:.1f} times its share "
        f"in {names[domain]}."
    )
    if len(analysis.checkpoints) > 1:
        first = last.shifts[0]
        mean = np.mean(list(first.shift.values()))
        return f"{mean:.1%} of all choices of experts differ between {first.other} and {last.name}. {busiest}"
    if not (found := measures.specialists(share, 1)):
        return busiest
    best = found[0]
    return (
        f"Expert {best.expert} of layer {analysis.layers[best.layer]} is the specialist of {names[best.domain]}: "
        f"{best.load:.1f} times its share there, {best.elsewhere:.1f} elsewhere. {busiest}"
    )


def as_text(analysis: Analysis) -> str:
    """The whole table."""
    last = analysis.checkpoints[-1]
    layers, experts = len(analysis.layers), analysis.num_experts
    parts = [
        f"{last.name}: {layers} MoE layers x {experts} experts, {analysis.experts_per_token} a token",
        _table(_domain_rows(analysis, last)),
    ]
    if found := measures.specialists(last.shares, ROWS):
        names = list(last.counts)
        rows = [["specialists", "layer", "expert", "load", "elsewhere"]] + [
            [
                names[one.domain],
                str(analysis.layers[one.layer]),
                str(one.expert),
                f"{one.load:.2f}x",
                f"{one.elsewhere:.2f}x",
            ]
            for one in found
        ]
        parts.append(_table(rows))
    if len(analysis.checkpoints) > 1:
        parts.append(_table(_series_rows(analysis)))
    return "\n\n".join([*parts, verdict(analysis)])


def _domain_rows(analysis: Analysis, load: CheckpointLoad) -> list[list[str]]:
    rows = [["domain", "tokens", "max violation", "worst layer", "mean of layers", "entropy"]]
    for name, share in zip(load.counts, load.shares, strict=True):
        violation = measures.max_violation(share)
        worst = int(violation.argmax())
        figures = [f"{violation[worst]:.2f}", str(analysis.layers[worst]), f"{violation.mean():.2f}"]
        rows.append([name, f"{analysis.tokens[name]:,}", *figures, f"{measures.entropy(share).mean():.3f}"])
    return rows


def _series_rows(analysis: Analysis) -> list[list[str]]:
    first = analysis.checkpoints[0].name
    rows = [["checkpoint", "max violation", "divergence", f"shift from {first}", "from the previous"]]
    for load in analysis.checkpoints:
        shifts = [f"{np.mean(list(one.shift.values())):.1%}" for one in load.shifts]
        violation, apart = measures.max_violation(load.shares).max(), measures.divergence(load.shares).mean()
        rows.append([load.name, f"{violation:.2f}", f"{apart:.3f}", *((shifts * 2)[:2] or ["", ""])])
    return rows


def _table(rows: list[list[str]]) -> str:
    """Columns to the right, but for the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

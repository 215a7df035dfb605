"""A parity check as a table for people."""

from __future__ import annotations

import textwrap

from dots_align.parity.check import Parity
from dots_align.parity.compare import TOLERANCE, Comparison
from dots_align.parity.diagnosis import aspects

HEADER = (
    "engine",
    "max |Δ|",
    "mean |Δ|",
    "top-1",
    "experts",
    "ties",
    "routed",
    "shared",
    "bias",
    "rope",
    "stop",
    "text",
)


def as_text(found: Parity) -> str:
    rows = [HEADER, *(_cells(found, row) for row in found.rows)]
    columns = zip(*(row for row in rows if len(row) == len(HEADER)), strict=True)
    widths = [max(map(len, column)) for column in columns]
    widths[0] = max(len(row[0]) for row in rows)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    parts = [
        f"{found.checkpoint}, every engine against dots1 as it is defined (fp32)",
        "\n".join(lines),
        *_remarks(found),
        found.verdict,
    ]
    return "\n\n".join(part for part in parts if part)


def _cells(found: Parity, row: Comparison) -> tuple[str, ...]:
    if row.skipped:
        return row.name, f"skipped: {row.skipped}"
    seen = aspects(found.mistakes, row, found.sensitivity)
    return (
        row.name,
        _number(row.max_difference) + (" (log-prob)" if row.unit != "logit" and row.max_difference is not None else ""),
        _number(row.mean_difference),
        "-" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
        _experts(row),
        str(row.num_ties) if row.num_choices is not None else "-",
        *(seen.get(aspect, "-") for aspect in ("routed", "shared", "bias", "rope")),
        "-" if row.stopped is None else "ok" if row.stopped else "wrong",
        "-" if row.template_equal is None else "ok" if row.template_equal else "wrong",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _experts(row: Comparison) -> str:
    if row.num_choices is None or row.num_changed is None:
        return "-"
    return f"{row.num_choices - row.num_changed}/{row.num_choices}"


def _remarks(found: Parity) -> list[str]:
    lines = [f"{row.name}: {problem}" for row in found.rows for problem in row.problems]
    late = "its log-probs of prompts are told one position late, and were compared so; do not use them otherwise"
    lines += [f"{row.name}: {late}" for row in found.rows if row.late]
    hidden = [name for name, moved in found.sensitivity.items() if moved < 10 * TOLERANCE]
    if hidden:
        lines.append(
            f"not provable on this checkpoint, whose logits it would not move: {', '.join(hidden)}"
            + ("; its correction bias decides nothing" if "lost correction bias" in hidden else "")
        )
    return ["\n".join(textwrap.fill(line, 118, subsequent_indent="  ") for line in lines)] if lines else []

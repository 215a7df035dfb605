"""What went wrong in a run, from its logs alone: known causes, each with the figures that speak for it.

A cause is reported where its own evidence is beyond doubt (rewards that fail, policies that disagree), or where weaker
evidence (groups without variance, long answers) comes with a run that did not get better. A run that learned gets none.
"""

from __future__ import annotations

from statistics import median

from dots_align.report.causes import CAUSES
from dots_align.report.evidence import WINDOW, Case, Finding, Outcome, consequence, outcome


def autopsy(case: Case) -> list[Finding]:
    """The causes that the logs show, the likeliest first: what began first, and of those the one higher in `CAUSES`."""
    went = outcome(case)
    found = [finding for detect in CAUSES for finding in detect(case, went)]
    found.sort(key=lambda finding: -1 if finding.first_step is None else finding.first_step)
    if not found and went.verdict == "worse":
        found = [_unexplained(case, went)]
    return found


def _unexplained(case: Case, went: Outcome) -> Finding:
    """What moved most, where no known cause shows."""
    moved = []
    for name, points in case.points.items():
        if not name.startswith(f"{case.kind}/") or name == went.measure:
            continue
        before = [v for step, v in points if v is not None and step < (went.since or 0)]
        after = [v for step, v in points if v is not None and step >= (went.since or 0)]
        if len(before) >= WINDOW and len(after) >= 3:
            middle = median(before)
            spread = median(abs(v - middle) for v in before) or 1e-9 + 1e-3 * abs(middle)
            moved.append((abs(median(after) - middle) / spread, name, middle, median(after)))
    moved.sort(reverse=True)
    evidence = consequence(went) + [f"{name} went from {a:.3g} to {b:.3g}" for _, name, a, b in moved[:3]]
    advice = "None of the known causes shows; these metrics moved most when it began."
    return Finding("unknown", "It got worse", evidence, advice, [went.measure, *(m[1] for m in moved[:3])], went.since)

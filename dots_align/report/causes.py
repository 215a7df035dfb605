"""The known causes of a run that went wrong, each with the figures that speak for it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from dots_align.report.evidence import (
    WINDOW,
    Case,
    Finding,
    Outcome,
    before,
    consequence,
    fall,
    names_of,
    not_finite,
    sustained,
)
from dots_align.report.reading import as_number

GRADER_ERRORS = 0.05  # share of reward calls
MISMATCH_KL, MISMATCH_MEAN = 0.01, 0.05  # nats; fp32 rounding is 1e-6, bf16 about 1e-3 and 1e-2
ROUTER_SHIFT = 0.05  # share of (token, layer) choices
SILENT_GROUPS = 0.8


def grader(case: Case, went: Outcome) -> list[Finding]:
    errors = case.series("reward_errors")
    functions = case.recipe.get("rewards")
    calls = (case.key("train.num_prompts_per_step") or 0) * (case.key("rollout.group_size") or 0)
    calls *= len(functions) if isinstance(functions, list) else 1
    shares = [(step, min(1.0, count / calls) if calls else float(count > 0)) for step, count in errors]
    found = []
    if (first := sustained(shares, lambda share: share >= GRADER_ERRORS)) is not None:
        counted = [count for step, count in errors if step >= first]
        worst = max(share for step, share in shares if step >= first)
        evidence = [
            f"{sum(counted):,.0f} reward calls failed from step {first} on"
            + (f", up to {worst:.0%} of a step's" if calls else "")
            + "; each counts as 0",
            *consequence(went),
        ]
        advice = "The log holds the first failure of each reward function in full. Mend it, or raise timeout_seconds."
        found.append(Finding("grader", "The grader fails", evidence, advice, names_of(case, "reward_errors"), first))
    return found + _strict_grader(case)


def _strict_grader(case: Case) -> list[Finding]:
    """Answers that hold the reference and get nothing for it."""
    failed = [s for s in case.samples if s.get("answer") and _first_reward(s) <= 0]
    right = [s for s in failed if _holds(str(s.get("response") or ""), str(s["answer"]))]
    if len(right) < max(5, 0.2 * len(failed)):
        return []
    example = right[-1]
    evidence = [
        f"{len(right)} of {len(failed)} logged answers without reward end with the reference answer",
        f"step {example.get('step')}: “{_tail(example['response'])}” got {_first_reward(example):g}, "
        f"the reference is “{_tail(example['answer'])}”",
    ]
    advice = "The reward function expects another form than the answers have: test it on these samples."
    first = next((s.get("step") for s in right), None)
    return [Finding("grader", "The grader rejects right answers", evidence, advice, names_of(case, "reward"), first)]


def router_shift(case: Case, went: Outcome) -> list[Finding]:
    shift, entropy = case.series("mismatch_router_shift"), case.series("router_entropy")
    found = []
    if (first := sustained(shift, lambda value: value >= ROUTER_SHIFT)) is not None:
        worst = max(value for step, value in shift if step >= first)
        evidence = [
            f"up to {worst:.1%} of the experts that trainer and rollout chose differ from step {first} on "
            f"(before: {before(shift, first):.2%})",
            *consequence(went),
        ]
        advice = "Look for a routing bias that the rollout did not get, or another precision; router.replay=R3 helps."
        names = names_of(case, "mismatch_router_shift", "mismatch_kl")
        found.append(Finding("router_shift", "Trainer and rollout route differently", evidence, advice, names, first))
    early = median([value for _, value in entropy[:WINDOW]]) if entropy else 0.0
    if (first := sustained(entropy, lambda value: value < min(0.35, 0.6 * early))) is not None:
        last = entropy[-1][1]
        evidence = [f"the entropy of the expert load fell from {early:.2f} to {last:.2f} (1 = even)"]
        if violation := case.series("router_max_violation"):
            evidence.append(f"max violation went from {violation[0][1]:.1f} to {violation[-1][1]:.1f}")
        advice = "Few experts do all the work: try router.bias_policy=update, or router.balance_loss_coef."
        names = names_of(case, "router_entropy", "router_max_violation")
        found.append(
            Finding("router_shift", "The router collapses", evidence + consequence(went), advice, names, first)
        )
    return found


def mismatch(case: Case, went: Outcome) -> list[Finding]:
    if stopped := _stopped_by_the_gate(case):
        return [stopped]
    for name, limit in (("mismatch_kl", MISMATCH_KL), ("mismatch_mean", MISMATCH_MEAN), ("agreement_mean", 0.05)):
        points = case.series(name)
        first = sustained(points, lambda value, limit=limit: abs(value) >= limit)
        if first is None:
            continue
        worst = max(abs(value) for step, value in points if step >= first)
        evidence = [
            f"{name} reaches {worst:.3g} nats from step {first} on (before: {before(points, first):.2g}); "
            f"rounding alone stays far below {limit:g}"
        ]
        odd = [case.series(f"mismatch_ratio_{tail}") for tail in ("0_0.5", "above_2")]
        share = sum(points[-1][1] for points in odd if points)
        if share > 0:
            evidence.append(f"{share:.1%} of tokens are more than twice as (un)likely to the trainer as to the rollout")
        advice = (
            "Rollouts come from another policy than the one that trains: stale weights, a lost buffer, another "
            "precision. mismatch.stop_above stops such a run; rollout_correction makes small differences harmless."
        )
        if stale := case.series("staleness"):
            evidence.append(f"rollouts are {stale[-1][1]:.2g} steps behind the trainer, as the recipe asks")
        names = names_of(case, name, "agreement_max")
        return [
            Finding(
                "mismatch",
                "Trainer and rollout disagree",
                evidence + consequence(went),
                advice,
                names,
                first,
            )
        ]
    return []


def _stopped_by_the_gate(case: Case) -> Finding | None:
    gate = case.recipe.get("mismatch")
    limit, measure = case.key("mismatch.stop_above"), gate.get("measure") if isinstance(gate, dict) else None
    points = case.series(f"mismatch_{measure}")
    if limit is None or not points or points[-1][1] <= limit:
        return None
    step, value = points[-1]
    evidence = [
        f"the run was stopped at step {step}: mismatch_{measure} was {value:.3g}, above mismatch.stop_above={limit:g} "
        f"(before: {before(points, step):.2g})"
    ]
    if (shift := case.series("mismatch_router_shift")) and shift[-1][1] > 0:
        evidence.append(f"{shift[-1][1]:.1%} of the experts chosen differ")
    advice = "No update was made on these rollouts. Look for stale weights, a lost routing bias, another precision."
    names = names_of(case, f"mismatch_{measure}", "mismatch_router_shift")
    return Finding("mismatch", "Trainer and rollout disagree", evidence, advice, names, step)


def numbers(case: Case, went: Outcome) -> list[Finding]:
    bad = not_finite(case)
    if not bad:
        return []
    steps = min(step for _, step in bad)
    evidence = [f"{name} is not a finite number at step {step}" for name, step in bad[:3]]
    if (norm := [p for p in case.series("grad_norm") if p[0] < steps]) and norm[-1][1] > 5 * median(v for _, v in norm):
        evidence.append(
            f"the gradient norm before that was {norm[-1][1]:.3g}, usually {median(v for _, v in norm):.3g}"
        )
    advice = "Lower optim.learning_rate, lengthen the warm-up, and look at the batch of that step."
    return [Finding("numbers", "Numbers ran off", evidence, advice, [name for name, _ in bad[:3]], steps)]


def length(case: Case, went: Outcome) -> list[Finding]:
    sizes, stops = case.series("response_length"), case.series("stop_rate")
    if len(sizes) < 2 * WINDOW:
        return []
    early, late = median(v for _, v in sizes[:WINDOW]), median(v for _, v in sizes[-WINDOW:])
    fallen = fall(stops)
    limit = case.key("rollout.max_tokens") or math.inf
    names = names_of(case, "response_length", "response_length_correct", "response_length_wrong", "stop_rate")
    if late >= 1.5 * early and (
        fallen >= 0.2 or late >= 0.9 * limit or (late >= 2 * early and went.verdict == "worse")
    ):
        first = sustained(sizes, lambda value: value >= 1.5 * early)
        evidence = [f"answers grew from {early:.0f} to {late:.0f} tokens" + _of_limit(late, limit)]
        if fallen >= 0.05:
            evidence.append(f"the share that ends by itself fell from {stops[0][1]:.0%} to {stops[-1][1]:.0%}")
        right, wrong = case.series("response_length_correct"), case.series("response_length_wrong")
        if right and wrong:
            evidence.append(f"at the end right answers have {right[-1][1]:.0f} tokens, wrong ones {wrong[-1][1]:.0f}")
        advice = "Try algorithm.name=dapo (overlong penalty, token mean), and see whether answers repeat themselves."
        return [Finding("length", "Answers explode in length", evidence + consequence(went), advice, names, first)]
    if late <= 0.3 * early and went.verdict != "better":
        first = sustained(sizes, lambda value: value <= 0.5 * early)
        evidence = [f"answers shrank from {early:.0f} to {late:.0f} tokens", *consequence(went)]
        return [Finding("length", "Answers collapse", evidence, "See what the shortest answers earn.", names, first)]
    return []


def zero_variance(case: Case, went: Outcome) -> list[Finding]:
    silent, prompts = case.series("zero_variance_groups"), case.key("train.num_prompts_per_step")
    if went.verdict == "better" or not prompts or len(silent) < WINDOW:
        return []
    shares = [(step, count / prompts) for step, count in silent]
    tail = [share for _, share in shares[-max(WINDOW, len(shares) // 4) :]]
    first = sustained(shares, lambda share: share >= SILENT_GROUPS)
    if median(tail) < SILENT_GROUPS:
        return []
    if went.since is not None and (first is None or not went.since - WINDOW <= first <= went.since):
        return []  # a consequence, or nothing that hurt
    rewards = case.series("reward")
    level = median(v for _, v in rewards[-WINDOW:]) if rewards else 0.0
    easy = bool(rewards) and level >= 0.9 * max(1.0, *(v for _, v in rewards))
    what = "all right" if easy else "all alike, mostly all wrong"
    evidence = [
        f"in {median(tail):.0%} of groups every answer gets the same reward ({what}): they teach nothing",
        f"the mean reward there is {level:.3g}",
        *consequence(went),
    ]
    easier = "Take harder prompts." if easy else "The prompts are too hard, or the reward is blind."
    advice = f"{easier} algorithm.max_refill_rounds (as in dapo) draws others in their place."
    names = names_of(case, "zero_variance_groups", "reward")
    return [Finding("zero_variance", "Groups without variance", evidence, advice, names, first)]


def data(case: Case, went: Outcome) -> list[Finding]:
    evidence = [*_answers(case.samples), *(_repeats(case.samples) if went.verdict != "better" else [])]
    first, spikes = None, _spikes(case)
    if spikes:
        shown = ", ".join(map(str, spikes[:5])) + (", …" if len(spikes) > 5 else "")
        evidence.append(f"the loss is over 3 times its usual value at step {shown}: batches unlike the others")
        first = spikes[0]
    if not evidence:
        return []
    advice = "Look at these records in the data file; the order depends on the seed alone, so a step can be repeated."
    return [Finding("data", "The data is amiss", evidence + consequence(went), advice, names_of(case, "loss"), first)]


def step_size(case: Case, went: Outcome) -> list[Finding]:
    """Updates that move the policy too far, told from the trust region; only where the run got worse."""
    if went.verdict != "worse":
        return []
    evidence, first = [], []
    for name, limit, said in (
        ("pg_clipfrac", 0.3, "{:.0%} of tokens are clipped"),
        ("ppo_kl", 0.1, "an update moves the policy by {:.2g} nats"),
        ("kl", 1.0, "the policy is {:.2g} nats away from the reference"),
    ):
        points = case.series(name)
        if (step := sustained(points, lambda value, limit=limit: value >= limit)) is not None:
            evidence.append(said.format(max(v for s, v in points if s >= step)) + f" (from step {step} on)")
            first.append(step)
    norms = case.series("grad_norm")
    usual = median(v for _, v in norms[: max(WINDOW, len(norms) // 4)]) if norms else 0.0
    if usual and (step := sustained(norms, lambda value: value >= 10 * usual)) is not None:
        evidence.append(f"the gradient norm is over 10 times its first {usual:.2g} from step {step} on")
        first.append(step)
    if not evidence:
        return []
    advice = "Lower optim.learning_rate or num_epochs, or add algorithm.kl_coef."
    names = names_of(case, "pg_clipfrac", "ppo_kl", "kl", "grad_norm")
    return [Finding("step_size", "Updates are too large", evidence + consequence(went), advice, names, min(first))]


def hacking(case: Case, went: Outcome) -> list[Finding]:
    held_out = [v for _, v in case.points.get("eval/exact_match", []) if v is not None]
    if went.verdict != "better" or not went.measure.endswith("reward") or len(held_out) < 2:
        return []
    if held_out[-1] >= max(held_out) - 0.05 or held_out[-1] >= held_out[0] - 0.02:
        return []
    evidence = [
        f"the reward rose from {went.start:.3g} to {went.end:.3g}",
        f"held-out exact match fell from {max(held_out):.1%} to {held_out[-1]:.1%}",
    ]
    advice = "The reward pays for something else than the evaluation measures: read the best-paid samples."
    names = [f"{case.kind}/reward", "eval/exact_match"]
    return [Finding("hacking", "The reward is not what is evaluated", evidence, advice, names)]


CAUSES: tuple[Callable[[Case, Outcome], list[Finding]], ...] = (
    numbers,
    grader,
    router_shift,
    mismatch,
    data,
    length,
    zero_variance,
    step_size,
    hacking,
)


def _first_reward(sample: dict[str, Any]) -> float:
    parts = sample.get("rewards")
    value = next(iter(parts.values()), None) if isinstance(parts, dict) else sample.get("reward")
    return as_number(value) or 0.0


def _holds(response: str, answer: str) -> bool:
    """Whether a response ends with the answer, boxed or plain."""
    tail = re.escape(answer.strip())
    return bool(answer.strip()) and bool(re.search(rf"(\\boxed\{{\s*{tail}\s*\}}|(^|[\s=:*]){tail}[\s.*]*$)", response))


def _tail(text: Any, size: int = 60) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= size else f"…{text[-size:]}"


def _answers(samples: Sequence[dict[str, Any]]) -> list[str]:
    """Reference answers that are missing, or contradict each other."""
    if len(samples) < 10:
        return []
    found = []
    missing = sum(not str(sample.get("answer") or "").strip() for sample in samples)
    if 0.1 <= missing / len(samples) <= 0.9:
        found.append(
            f"{missing} of {len(samples)} logged prompts ({missing / len(samples):.0%}) have no reference answer"
        )
    references: dict[str, set[str]] = {}
    for sample in samples:
        references.setdefault(str(sample.get("prompt")), set()).add(str(sample.get("answer")))
    torn = [prompt for prompt, answers in references.items() if len(answers) > 1]
    if len(torn) >= max(3, 0.05 * len(references)):
        found.append(
            f"{len(torn)} of {len(references)} logged prompts have contradicting reference answers, "
            f"for example “{_tail(torn[0])}”: {', '.join(sorted(references[torn[0]])[:3])}"
        )
    return found


def _repeats(samples: Sequence[dict[str, Any]]) -> list[str]:
    if len(samples) < 50:
        return []
    prompt, count = Counter(str(sample.get("prompt")) for sample in samples).most_common(1)[0]
    if count < 0.2 * len(samples):
        return []
    return [f"one prompt makes up {count / len(samples):.0%} of the logged ones: “{_tail(prompt)}”"]


def _spikes(case: Case) -> list[int]:
    """Steps of a supervised run whose loss is over 3 times that of the steps before, and large for the whole run."""
    if case.kind not in ("sft", "rft", "dpo", "reward_model"):
        return []
    losses = case.series("loss")
    floor = 0.5 * losses[0][1] if losses else 0.0
    return [
        step
        for index, (step, value) in enumerate(losses)
        if index >= WINDOW and value > floor and value > 3 * median(v for _, v in losses[max(0, index - 20) : index])
    ]


def _of_limit(size: float, limit: float) -> str:
    return f" (of at most {limit:.0f})" if size >= 0.8 * limit else ""

"""A plan as a table for people, and as JSON."""

from __future__ import annotations

import shlex
import textwrap
from typing import Any

from dots_align.planner.hardware import ACHIEVED, CONTEXT_BYTES, FRAGMENTED, GIB, GPUS, Gpu
from dots_align.planner.memory import CATEGORIES
from dots_align.planner.plan import Plan
from dots_align.planner.search import Suggestion
from dots_align.planner.work import BUSIEST, PADDING, Launch

MEANING = {
    "parameters": "this GPU's part of the weights; more GPUs share them, bfloat16 halves them",
    "gradients": "of this GPU's part of the weights; more GPUs share them",
    "optimizer": "moments and fp32 masters; parallel.offload_optimizer moves them to the host, LoRA has few",
    "gathered weights": "whole layers for computing, in a rollout all of them; a larger parallel.ep makes them smaller",
    "gradient buffers": "of whole layers, until GPUs have added them up; with several forwards a step, of all layers",
    "activations": "kept from forward to backward; fewer tokens a forward, or train.gradient_checkpointing",
    "logits": "a chunk of the vocabulary's",
    "KV cache": "of all sequences at once; lower rollout.max_num_sequences or max_tokens",
}


def as_text(name: str, source: str, plan: Plan, nearest: dict[str, tuple[Suggestion, Plan] | None]) -> str:
    """The whole page.

    Args:
        name: of the recipe. source: where the model's shape is known from. nearest: for each GPU that the plan does not
            fit, what would.
    """
    parts = [
        _heading(name, source, plan),
        _memory(plan),
        "\n".join(_verdict(name, plan, gpu, nearest) for gpu in GPUS) + "\n" + _host(plan),
        _traffic(plan),
        _time(plan),
        _assumptions(plan),
    ]
    return "\n\n".join(parts)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def _launch(launch: Launch) -> str:
    return f"{launch.nodes} x {launch.gpus_per_node} GPUs"


def _heading(name: str, source: str, plan: Plan) -> str:
    shards, batch, parallel = plan.shards, plan.load.work.batch, plan.recipe.parallel
    counts = f"{_count(shards.parameters)} parameters, {_count(shards.active)} active a token"
    trained = f"LoRA, {_count(shards.adapter)} trained" if shards.adapter else "all trained"
    if plan.critic is not None:
        trained += f"; a critic of {_count(plan.critic.parameters)} beside it"
    replicas = f", {parallel.dp_replicate} replicas" if parallel.dp_replicate > 1 else ""
    return "\n".join(
        [
            f"{name}: {plan.recipe.stage} on {_launch(plan.launch)}, ep {parallel.ep}{replicas}",
            f"model   {source}",
            f"        {counts}; {trained}",
            f"step    {plan.load.step_tokens:,} tokens at most; {plan.load.forwards} forward(s) of up to "
            f"{batch.tokens:,} tokens on each GPU",
        ]
    )


def _memory(plan: Plan) -> str:
    names, small = list(plan.phases), plan.peak < GIB
    unit = 2**20 if small else GIB
    shown = [c for c in CATEGORIES if any(plan.phases[n][c] for n in names)]
    lines = [f"{'MiB' if small else 'GiB'} on a GPU".ljust(24) + "".join(f"{n:>{_width(n)}}" for n in names)]
    for category in shown:
        lines.append(f"  {category:22}" + "".join(f"{plan.phases[n][category] / unit:>{_width(n)},.1f}" for n in names))
    totals = "".join(f"{sum(plan.phases[n].values()) / unit:>{_width(n)},.1f}" for n in names)
    lines.append(f"{'total':24}{totals}")
    lines.append(f"peak: {plan.worst_phase}; most of it is {plan.largest}:")
    lines.append(f"  {MEANING[plan.largest]}")
    return "\n".join(lines)


def _width(name: str) -> int:
    return max(12, len(name) + 2)


def _verdict(name: str, plan: Plan, gpu: Gpu, nearest: dict[str, tuple[Suggestion, Plan] | None]) -> str:
    room = f"{gpu.name} ({_gib(gpu.usable)} of {_gib(gpu.memory)} GiB usable)"
    if plan.fits(gpu):
        return f"{room}: fits, {_gib(gpu.usable - plan.peak)} GiB to spare"
    missing = f"{room}: DOES NOT FIT, {_gib(plan.peak - gpu.usable)} GiB too much"
    found = nearest.get(gpu.name)
    if found is None:
        return f"{missing}; no layout was found that fits, with up to 16 nodes"
    suggestion, better = found
    lines = [missing, f"  change first: {' '.join(map(shlex.quote, suggestion.overrides))}"]
    if suggestion.launch != plan.launch:
        lines.append(f"  on {_launch(suggestion.launch)}: --nodes {suggestion.launch.nodes}")
    lines.append(f"  then {better.worst_phase} peaks at {_gib(better.peak)} GiB")
    if better.load.step_tokens != plan.load.step_tokens:
        lines[-1] += f"; a step has {better.load.step_tokens:,} tokens then"
    return "\n".join(lines)


def _host(plan: Plan) -> str:
    return f"host memory of a node: {_gib(plan.host_bytes)} GiB"


def _traffic(plan: Plan) -> str:
    traffic = plan.traffic
    return (
        f"GB through each GPU in a step: all-to-all {traffic.exchange / 1e9:,.1f} (tokens x k rows, each way), weights "
        f"gathered {traffic.gather / 1e9:,.1f}, gradients reduced {traffic.reduce / 1e9:,.1f}"
    )


def _time(plan: Plan) -> str:
    rows = ["compute", "exchange", "weights_exposed", "optimizer", "rollout", "total"]
    labels = {
        "compute": "computing",
        "exchange": "all-to-all",
        "weights_exposed": "weights, beyond computing",
    }
    lines = [f"{'seconds a step, ESTIMATED':28}" + "".join(f"{gpu.name:>12}" for gpu in GPUS)]
    for row in rows:
        values = [getattr(plan.seconds[gpu.name], row) for gpu in GPUS]
        if any(values):
            lines.append(f"  {labels.get(row, row):26}" + "".join(f"{v:>12,.2f}" for v in values))
    rates = [plan.load.step_tokens / plan.seconds[gpu.name].total for gpu in GPUS]
    lines.append(f"  {'tokens/s, all GPUs':26}" + "".join(f"{r:>12,.0f}" for r in rates))
    return "\n".join(lines)


def _assumptions(plan: Plan) -> str:
    gpu, load = GPUS[0], plan.load
    hbm = " | ".join(f"{g.hbm / 1e12:.2f}" for g in GPUS)
    found = [
        f"{gpu.bf16 / 1e12:.0f} TFLOP/s in bf16 x {ACHIEVED.products:.2f}",
        f"HBM {hbm} TB/s x {ACHIEVED.hbm:.2f}",
        f"NVLink {gpu.nvlink / 1e9:.0f} GB/s x {ACHIEVED.nvlink:.2f}",
        f"InfiniBand {gpu.infiniband / 1e9:.0f} GB/s a GPU x {ACHIEVED.infiniband:.2f}",
        f"usable memory: all but {CONTEXT_BYTES // GIB} GiB for CUDA and NCCL and {FRAGMENTED:.0%} for fragments",
        f"packed attention pads to {PADDING} x tokens",
    ]
    if load.work.batch.exchanged:
        found.append(f"the busiest GPU's experts get {BUSIEST} x the mean of rows")
    if load.work.offload:
        found.append(f"{ACHIEVED.host_copy / 1e9:.0f} GB/s a GPU to and from the host")
        found.append(f"AdamW there reads and writes {ACHIEVED.host_memory / 1e9:.0f} GB/s a node")
    if (sampled := load.work.rollout or load.work.before or load.work.evaluation) is not None:
        found.append(f"prompts of up to {sampled.prompt_tokens} tokens (--prompt-tokens)")
    if load.work.rollout is not None:
        found.append(f"a decoding step costs {1e3 * ACHIEVED.launch:.1f} ms a layer beside what it reads")
    return textwrap.fill("assumed: " + "; ".join(found), 118, subsequent_indent="         ")


def as_json(name: str, source: str, plan: Plan, nearest: dict[str, tuple[Suggestion, Plan] | None]) -> dict[str, Any]:
    """What the page says, in bytes and seconds."""
    return {
        "recipe": name,
        "stage": plan.recipe.stage,
        "model": source,
        "nodes": plan.launch.nodes,
        "gpus_per_node": plan.launch.gpus_per_node,
        "parameters": plan.shards.parameters,
        "active_parameters": plan.shards.active,
        "adapter_parameters": plan.shards.adapter,
        "critic_parameters": plan.critic.parameters if plan.critic is not None else 0,
        "step_tokens": plan.load.step_tokens,
        "forward_tokens": plan.load.work.batch.tokens,
        "bytes": plan.phases,
        "peak": {"phase": plan.worst_phase, "bytes": plan.peak, "largest": plan.largest},
        "host_bytes_per_node": plan.host_bytes,
        "traffic_bytes": vars(plan.traffic),
        "gpus": {gpu.name: _gpu(plan, gpu, nearest.get(gpu.name)) for gpu in GPUS},
    }


def _gpu(plan: Plan, gpu: Gpu, nearest: tuple[Suggestion, Plan] | None) -> dict[str, Any]:
    seconds = plan.seconds[gpu.name]
    found: dict[str, Any] = {
        "usable_bytes": gpu.usable,
        "fits": plan.fits(gpu),
        "estimated_seconds": {**vars(seconds), "total": seconds.total},
        "estimated_tokens_per_second": plan.load.step_tokens / seconds.total,
    }
    if not plan.fits(gpu):
        found["nearest"] = nearest and {
            "overrides": list(nearest[0].overrides),
            "nodes": nearest[0].launch.nodes,
            "peak_bytes": nearest[1].peak,
        }
    return found

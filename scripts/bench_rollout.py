"""How fast are rollouts? 8 prompts x 16 samples of mixed lengths, against what else could generate them.

In one process, on the same weights, prompts and numbers of tokens, taking turns: transformers' `generate` (padded on
the left, until the longest sample is done: what TRL does by default), its continuous batching, llama.cpp (the exported
GGUF at the same precision, batched; where llama-cpp-python is installed), and our engine with its torch and its native
forward. Only tokens that were asked for count. Random weights do not end by themselves, so each prompt has a
length that all its samples run to.

Also: whether what was sampled is what plain transformers says in one forward; whether ids depend on the company in
bf16; what a group's shared prompt saves; where the time goes, and how far that is from this machine's limits.

On a GPU it takes a model of the released width with three layers (6 billion parameters) in bf16; the last lines of the
profile then compare a decode step with the card's own rates.

Prints tables, then one line `RESULT {json}`; of each ratio (their median seconds / ours) the worst preset and dtype:

    ratio_vs_generate, ratio_vs_continuous_batching, ratio_vs_llama_cpp   null where the other is not installed
    max_logprob_diff       fp32, largest difference to a plain forward, of tokens before which no route differs
    kv_ratio               cache of 8 x 16 samples, 512 + 128 tokens, over an unshared one, given a fifth of that
    kv_ratio_unlimited, kv_budget_slowdown    the same without a budget; time with the budget / time without
    num_flips, num_tokens  tokens behind a route that differs, each shown to be a tie; tokens compared
    bf16_same_ids          share of samples with the same ids alone and in company, {forward: share}
    tokens_per_second, peak_mib   {preset dtype: {contestant: median}}
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from dots_align.checkpoint import save_model
from dots_align.data import synthetic
from dots_align.data.tokenizer import train_tokenizer
from dots_align.export.gguf import write_gguf
from dots_align.model import experts
from dots_align.model.dots1 import count_parameters, create_model, preset_config
from dots_align.model.router import find_flips, keep_router_in_fp32, record_routes
from dots_align.rollout.engine import RolloutEngine
from dots_align.rollout.forward import CompiledForward
from dots_align.rollout.native import why_not
from dots_align.types import GenerationRequest, SamplingParams

SAMPLES = 16
TIE = 1e-6
GPU_LAYERS = 3


@dataclass(frozen=True)
class Workload:
    """`prompts[i]` is continued SAMPLES times by `limits[i]` tokens."""

    prompts: list[list[int]]
    limits: list[int]

    @staticmethod
    def make(vocab_size: int, longest_prompt: int, longest_answer: int) -> Workload:
        random = np.random.default_rng(0)
        lengths = np.linspace(longest_prompt / 8, longest_prompt, 8).round().astype(int)
        limits = random.permutation(np.linspace(longest_answer / 8, longest_answer, 8).round().astype(int))
        return Workload([random.integers(0, vocab_size, n).tolist() for n in lengths], limits.tolist())

    @property
    def num_tokens(self) -> int:
        return SAMPLES * sum(self.limits)

    def requests(self) -> list[GenerationRequest]:
        return [
            GenerationRequest(p, SAMPLES, SamplingParams(max_tokens=n, seed=i))
            for i, (p, n) in enumerate(zip(self.prompts, self.limits, strict=True))
        ]


def make_model(preset: str, dtype: torch.dtype, device: str) -> Any:
    config = preset_config("llm1", num_hidden_layers=GPU_LAYERS) if preset == "llm1" else preset_config(preset)
    model: Any = create_model(config, 0)
    keep_router_in_fp32(model)
    return model.to(device=device, dtype=dtype).eval()


# --------------------------------------------------------------------------------------------------------- contestants


def generate(model: Any, work: Workload) -> float:
    """Seconds of transformers' `generate`."""
    width = max(map(len, work.prompts))
    ids = torch.zeros(len(work.prompts) * SAMPLES, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(p for p in work.prompts for _ in range(SAMPLES)):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    keys = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max(work.limits), pad_token_id=0, eos_token_id=None)
    started = time.perf_counter()
    model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=keys)
    return time.perf_counter() - started


def continuous_batching(model: Any, work: Workload) -> float:
    """Seconds of transformers' continuous batching, its thread started before."""
    keys = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0, num_return_sequences=SAMPLES)
    blocks = len(work.prompts) * SAMPLES * (-(-(max(map(len, work.prompts)) + max(work.limits)) // 32) + 1)
    batching = ContinuousBatchingConfig(block_size=32, num_blocks=blocks, max_batch_tokens=1024)
    manager = model.init_continuous_batching(generation_config=keys, continuous_batching_config=batching)
    manager.start()
    try:
        started = time.perf_counter()
        for prompt, limit in zip(work.prompts, work.limits, strict=True):
            manager.add_request(prompt, max_new_tokens=limit)
        left, tokens = len(work.prompts) * SAMPLES, 0
        while left:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                left, tokens = left - 1, tokens + len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching died")
        seconds = time.perf_counter() - started
    finally:
        manager.stop(block=True)
        manager.destroy()
    if tokens != work.num_tokens:
        raise RuntimeError(f"transformers' continuous batching made {tokens} tokens of {work.num_tokens}")
    return seconds


def llama_cpp(gguf: Path, dtype: torch.dtype) -> Callable[[Any, Workload], float]:
    from llama_cpp_anchor import LlamaCpp

    def run(_model: Any, work: Workload) -> float:
        half = dtype == torch.bfloat16  # flash attention makes llama.cpp faster in bf16 and slower in fp32
        threads, kv_type = torch.get_num_threads(), "BF16" if half else "F32"
        with LlamaCpp(gguf, threads, kv_type, kv_unified=False, flash_attention=half) as llama:
            done = llama.generate(work.prompts, SAMPLES, work.limits)
        if done.num_tokens != work.num_tokens:
            raise RuntimeError(f"llama.cpp made {done.num_tokens} tokens of {work.num_tokens}")
        return done.seconds - done.sampling_seconds  # tokens are drawn in Python, which is not llama.cpp's fault

    return run


def engine(native: bool) -> Callable[[Any, Workload], float]:
    def run(model: Any, work: Workload) -> float:
        started = time.perf_counter()
        RolloutEngine(model, native=native).generate(work.requests())
        return time.perf_counter() - started

    return run


def contestants(model: Any, dtype: torch.dtype, directory: Path) -> dict[str, Callable[[Any, Workload], float]]:
    found: dict[str, Callable[[Any, Workload], float]] = {
        "generate": generate,
        "continuous_batching": continuous_batching,
    }
    if importlib.util.find_spec("llama_cpp") is not None and model.device.type == "cpu":
        tokenizer = train_tokenizer(synthetic.corpus(400), 512, model.config.max_position_embeddings)
        save_model(model, tokenizer, directory)
        kind = "F32" if dtype == torch.float32 else "BF16"
        found["llama_cpp"] = llama_cpp(write_gguf(directory, directory / "model.gguf", kind), dtype)
    found["torch"] = engine(False)
    if why_not(model) is None:
        found["native"] = engine(True)
    return found


# --------------------------------------------------------------------------------------------------------------- timing


class PeakMemory:
    """The most resident memory of this process while inside, over what there was before, in MiB."""

    def __enter__(self) -> PeakMemory:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.mib = (self.peak - self.before) / 2**20


@dataclass(frozen=True)
class Timed:
    seconds: dict[str, float]
    peak_mib: dict[str, float]


def race(model: Any, work: Workload, dtype: torch.dtype, directory: Path, repeats: int) -> Timed:
    """Median seconds of every contestant, taking turns."""
    runs = contestants(model, dtype, directory)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            ours = name in ("torch", "native")
            model.config._experts_implementation = experts.IMPLEMENTATION if ours else "grouped_mm"
            model.config._attn_implementation = "sdpa"
            with PeakMemory() as memory, torch.no_grad():
                seconds[name].append(run(model, work))
            peaks[name] = max(peaks.get(name, 0.0), memory.mib)
    model.config._attn_implementation = "sdpa"
    return Timed({name: statistics.median(s) for name, s in seconds.items()}, peaks)


# ------------------------------------------------------------------------------------------------------------ exactness


def against_plain_forward(model: Any, work: Workload) -> tuple[float, int, int]:
    """(largest difference in log-probability, tokens compared, tokens behind a tie that went another way)."""
    model.config._experts_implementation = "grouped_mm"
    model.config._attn_implementation = "sdpa"
    largest, compared, flipped = 0.0, 0, 0
    for request, group in zip(work.requests(), RolloutEngine(model).generate(work.requests(), True), strict=True):
        for sample in group:
            whole = torch.tensor([request.prompt_ids + sample.response_ids], device=model.device)
            with torch.no_grad(), record_routes(model, with_gaps=True) as recorded:
                logits = model(input_ids=whole, use_cache=False).logits[0].float()
            flips = find_flips(recorded.routes[0], recorded.gaps[0], sample.routes or b"")
            if flips.root_gap >= TIE:
                raise RuntimeError(f"a route differs where the scores of two experts are {flips.root_gap:.1e} apart")
            first, ids = len(request.prompt_ids) - 1, torch.tensor(sample.response_ids, device=model.device)
            wanted = logits[first:-1].log_softmax(-1).gather(-1, ids[:, None])[:, 0].cpu()
            same = ~flips.affected[first:].cpu()
            difference = (wanted - torch.tensor(sample.logprobs)).abs()[same]
            largest = max([largest, *difference.tolist()])
            compared, flipped = compared + len(difference), flipped + int((~same).sum())
    return largest, compared, flipped


def same_ids(model: Any, work: Workload, native: bool) -> float:
    """Share of samples whose ids are the same alone and in company."""
    together = RolloutEngine(model, native=native).generate(work.requests())
    pairs = []
    for request, group in zip(work.requests(), together, strict=True):
        pair = GenerationRequest(request.prompt_ids, 2, request.sampling)
        alone = RolloutEngine(model, 1, native=native).generate([pair])
        pairs += zip(alone[0], group[:2], strict=True)
    return sum(a.response_ids == b.response_ids for a, b in pairs) / len(pairs)


def cache_sizes(model: Any) -> dict[str, float]:
    """What sharing prompts saves: 8 x 16 samples of 512 + 128 tokens, against a cache of 640 tokens for each sample."""
    random = np.random.default_rng(1)
    prompts = random.integers(0, model.config.vocab_size, (8, 512)).tolist()
    requests = [GenerationRequest(p, SAMPLES, SamplingParams(max_tokens=128, seed=i)) for i, p in enumerate(prompts)]
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    unshared = 8 * SAMPLES * 640 * per_token
    found = {}
    for name, budget in (("unlimited", None), ("budget", unshared // 5)):
        runner = RolloutEngine(model, kv_cache_bytes=budget)
        started = time.perf_counter()
        runner.generate(requests)
        found[f"{name}_seconds"] = time.perf_counter() - started
        found[name] = runner.stats.peak_cache_bytes / unshared
    return found


# -------------------------------------------------------------------------------------------------------------- profile


def profile(model: Any, work: Workload) -> dict[str, float]:
    """Seconds of the engine's parts, in order of the work."""
    runner = RolloutEngine(model)
    with runner.session() as forward:
        if isinstance(forward, CompiledForward):
            forward.compiled.profile()  # forgets what it has counted so far
        runner.generate(work.requests())
        stats = runner.stats
        parts = {
            "scheduling": stats.schedule_seconds,
            "sampling": stats.sample_seconds,
            "forward": stats.forward_seconds,
        }
        if isinstance(forward, CompiledForward):
            parts |= {f"  {name}": seconds for name, seconds in forward.compiled.profile().items()}
    _, active = count_parameters(model)
    fed = stats.num_prompt_tokens + stats.num_sampled_tokens
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    parts["GFLOP/s"] = 2 * active * fed / stats.forward_seconds / 1e9
    parts["GB/s of weights, each read once a forward"] = whole * stats.num_forwards / stats.forward_seconds / 1e9
    return parts


def limits_of_the_machine(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(GFLOP/s of a large matrix product, GB/s of a large copy)."""
    size = 8192 if device == "cuda" else 1024

    def fastest(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(2**28 if device == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / fastest(lambda: left @ right)
    return flops / 1e9, 2 * source.nbytes / fastest(lambda: target.copy_(source)) / 1e9


# ----------------------------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=None, choices=["tiny", "small", "llm1"])
    parser.add_argument("--dtypes", nargs="+", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny in float32, short, once: under a minute on 2 cores")
    return parser.parse_args()


def print_race(name: str, work: Workload, timed: Timed) -> None:
    ours = timed.seconds.get("native", timed.seconds["torch"])
    print(f"\n{name}: {len(work.prompts)} x {SAMPLES} samples, {work.num_tokens} tokens")
    print(f"  {'':22}{'tokens/s':>10}{'ours over':>12}{'peak MiB':>10}")
    for contestant, seconds in timed.seconds.items():
        rate, peak = work.num_tokens / seconds, timed.peak_mib[contestant]
        print(f"  {contestant:22}{rate:10.0f}{seconds / ours:11.2f}x{peak:10.0f}", flush=True)


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    presets = args.presets or (["llm1"] if device == "cuda" else ["tiny"] if args.quick else ["tiny", "small"])
    dtypes = args.dtypes or (
        ["bfloat16"] if device == "cuda" else ["float32"] if args.quick else ["float32", "bfloat16"]
    )
    ratios: dict[str, list[float]] = {"generate": [], "continuous_batching": [], "llama_cpp": []}
    result: dict[str, Any] = {"tokens_per_second": {}, "peak_mib": {}, "bf16_same_ids": {}}
    exact: list[tuple[float, int, int]] = []
    for preset in presets:
        for dtype_name in dtypes:
            name, dtype = f"{preset} {dtype_name}", getattr(torch, dtype_name)
            model = make_model(preset, dtype, device)
            longest = 24 if args.quick else {"tiny": 128, "small": 64, "llm1": 512}[preset]
            work = Workload.make(model.config.vocab_size, 64 if args.quick or preset == "small" else 128, longest)
            with tempfile.TemporaryDirectory() as directory:
                repeats = 1 if args.quick else args.repeats
                timed = race(model, work, dtype, Path(directory), repeats)
            print_race(name, work, timed)
            ours = timed.seconds.get("native", timed.seconds["torch"])
            for other, found in ratios.items():
                found += [timed.seconds[other] / ours] if other in timed.seconds else []
            result["tokens_per_second"][name] = {n: round(work.num_tokens / s, 1) for n, s in timed.seconds.items()}
            result["peak_mib"][name] = {n: round(mib, 1) for n, mib in timed.peak_mib.items()}
            model.config._experts_implementation = experts.IMPLEMENTATION
            print_profile(profile(model, work), *limits_of_the_machine(device, dtype))
            if dtype == torch.float32:
                exact.append(against_plain_forward(model, work))
                model.config._experts_implementation = experts.IMPLEMENTATION
            elif preset == "tiny":
                forwards = {"torch": False} | ({"native": True} if "native" in timed.seconds else {})
                result["bf16_same_ids"] = {n: same_ids(model, work, native) for n, native in forwards.items()}
            del model
    sizes = cache_sizes(make_model("tiny", torch.float32, device))
    report = {f"ratio_vs_{n}": round(min(found), 3) if found else None for n, found in ratios.items()}
    report["max_logprob_diff"] = max((e[0] for e in exact), default=None)
    report |= {"kv_ratio": round(sizes["budget"], 4), "kv_ratio_unlimited": round(sizes["unlimited"], 4)}
    report["kv_budget_slowdown"] = round(sizes["budget_seconds"] / sizes["unlimited_seconds"], 3)
    report |= {"num_tokens": sum(e[1] for e in exact), "num_flips": sum(e[2] for e in exact)}
    report |= {"device": device, "threads": torch.get_num_threads(), "quick": args.quick}
    print("RESULT", json.dumps({**report, **result}))


def print_profile(parts: dict[str, float], gemm: float, bandwidth: float) -> None:
    print("  where the time of our engine goes, in seconds:")
    for part, seconds in parts.items():
        limit = f"   (this machine: {gemm:.0f})" if part == "GFLOP/s" else ""
        limit = f"   (a large copy: {bandwidth:.0f})" if part.startswith("GB/s") else limit
        print(f"    {part:44}{seconds:9.3f}{limit}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

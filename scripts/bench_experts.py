"""How fast are the routed experts? One MoE layer's experts, forward and backward, against transformers' own.

Compares `grouped` (ours) with transformers' `eager` loop, `batched_mm` and `grouped_mm` in one process: the same
weights, tokens and routing for all, a new routing in every round, the implementations taking turns, medians. Three
modes: everything in float32, everything in bfloat16 (router weights always float32), and float32 under bfloat16
autocast. On a GPU it also measures grouped products at the shapes of the dots.llm1 report's table 1.

Prints a table of milliseconds, then one line `RESULT {json}` with the keys

    ratio_vs_best            {tokens: time of the fastest other implementation / time of ours}, random routing,
                             the worse of float32 and bfloat16; above 1 ours is faster
    ratio_vs_best_skewed     the same with a skewed routing (expert e drawn with a probability like 1 / (e + 1))
    ratio_vs_best_autocast   the same as ratio_vs_best, under bfloat16 autocast
    ratio_vs_best_tiny       the same as ratio_vs_best, at the sizes of the tiny preset
    ratio_vs_eager_2048      the same against `eager` alone, at 2048 tokens (null if they are not among --tokens)
    milliseconds             {mode: {tokens: median of ours}}, random routing
    tflops, share_of_peak    {shape: forward and backward of our grouped product}, in TFLOP/s and as a share of a large
                             bfloat16 matrix product on the same card; null without a GPU
    device, threads, quick   where and how it ran
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.dots1.modeling_dots1 import Dots1NaiveMoe

from dots_align.model import experts
from dots_align.model.dots1 import PRESETS, preset_config

OURS = experts.IMPLEMENTATION
OTHERS = ("eager", "batched_mm", "grouped_mm")
MODES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
SKEWED_TOKENS = 1024
# Rounds that do not count: bf16 kernels are compiled for every new number of rows.
WARM_UP = 3
# An implementation this much slower than ours in the first round is not run again: its ratio is beyond doubt.
HOPELESS = 8.0
# (groups, rows a group, in, out) of table 1 of the dots.llm1 report (arXiv 2506.05767).
REPORT_SHAPES = [(g, m, k, n) for g in (4, 8) for m in (1024, 2048) for k, n in ((4096, 2816), (2816, 4096))]


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table: `tokens` through the experts of `config`."""

    name: str
    config: Any  # Dots1Config
    mode: str
    tokens: int
    skewed: bool = False

    def routing(self, round_: int, device: torch.device) -> torch.Tensor:
        """[tokens, k] distinct experts of every token; another one in each round, as in training."""
        generator = torch.Generator().manual_seed(round_)
        num_experts = self.config.n_routed_experts
        noise = torch.rand(self.tokens, num_experts, generator=generator)
        popularity = 1 / torch.arange(1, num_experts + 1) if self.skewed else torch.ones(num_experts)
        # The k smallest exponential arrival times are k draws without replacement.
        return (-noise.log() / popularity).topk(self.config.num_experts_per_tok, largest=False).indices.to(device)


class Runner:
    """Times one forward and backward of an implementation on a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        dtype = MODES[case.mode]
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.module = Dots1NaiveMoe(case.config).to(device, dtype)
        for weight in self.module.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        shape = (case.tokens, case.config.hidden_size)
        self.hidden = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        self.gates = torch.rand(case.tokens, case.config.num_experts_per_tok, device=device).requires_grad_()
        self.grad = torch.randn(shape, device=device, dtype=dtype)

    def seconds(self, implementation: str, round_: int) -> float:
        index = self.case.routing(round_, self.device)
        self.case.config._experts_implementation = implementation
        for tensor in (self.hidden, self.gates, *self.module.parameters()):
            tensor.grad = None
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.mode == "autocast")
        with clock(self.device) as elapsed:
            with autocast:
                out = self.module(self.hidden, index, self.gates)
            out.backward(self.grad)
        return elapsed()

    def gib(self, implementation: str) -> float:
        """Memory beyond a few activations: batched_mm gathers both weights once per row, keeps them for backward and
        makes a gradient of that size.
        """
        if implementation != "batched_mm":
            return 0.0
        per_expert = sum(w[0].numel() * w.element_size() for w in self.module.parameters())
        return 2.2 * self.case.tokens * self.case.config.num_experts_per_tok * per_expert / 2**30


@contextlib.contextmanager
def clock(device: torch.device) -> Iterator[Callable[[], float]]:
    """Wall-clock seconds of the block, with what it left running on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    ended = started
    yield lambda: ended - started
    wait()
    ended = time.perf_counter()


def measure(case: Case, device: torch.device, repeats: int, max_gib: float) -> dict[str, float | None]:
    """Median milliseconds of every implementation; None for one that was left out."""
    runner = Runner(case, device)
    able = [name for name in (OURS, *OTHERS) if runner.gib(name) < max_gib]
    times = {name: [runner.seconds(name, 0)] for name in able}
    in_question = [name for name in able if times[name][0] < HOPELESS * times[OURS][0]]
    for round_ in range(1, WARM_UP + repeats):
        for name in in_question:
            times[name].append(runner.seconds(name, round_))
    for name in in_question:
        del times[name][:WARM_UP]
    return {name: 1e3 * statistics.median(times[name]) if name in times else None for name in (OURS, *OTHERS)}


def ratio(measured: dict[str, float | None], others: tuple[str, ...] = OTHERS) -> float:
    """How many times faster ours is than the fastest of `others`."""
    ours = measured[OURS]
    assert ours is not None
    return min(value for name in others if (value := measured[name]) is not None) / ours


def worst(results: dict[Case, dict[str, float | None]], name: str, *modes: str) -> dict[str, float]:
    """{tokens: smallest ratio over the modes} of the cases called `name`."""
    chosen = {case: ratio(measured) for case, measured in results.items() if case.name == name and case.mode in modes}
    sizes = sorted({case.tokens for case in chosen})
    return {str(n): round(min(r for case, r in chosen.items() if case.tokens == n), 3) for n in sizes}


def build_cases(options: argparse.Namespace) -> list[Case]:
    config = preset_config(
        "small",
        hidden_size=options.hidden,
        moe_intermediate_size=options.width,
        n_routed_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    tiny = preset_config("tiny")
    cases = []
    for mode in options.modes:
        cases += [Case("random", config, mode, tokens) for tokens in options.tokens]
        cases += [Case("skewed", config, mode, min(SKEWED_TOKENS, max(options.tokens)), skewed=True)]
        cases += [Case("tiny", tiny, mode, tokens) for tokens in (512, 1024)]
    return cases


def tflops_at_report_shapes(device: torch.device, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """TFLOP/s of our grouped product, forward and backward, and its share of a large dense product's rate."""
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}

    def rate(work: Callable[[], Any], flops: float) -> float:
        times = []
        for _ in range(3 + repeats):
            with clock(device) as elapsed:
                for _ in range(10):  # launches overlap, as in a model
                    work()
            times.append(elapsed() / 10)
        return flops / statistics.median(times[3:]) / 1e12

    big = torch.randn(8192, 8192, **options)
    peak = rate(lambda: big @ big, 2 * 8192**3)
    achieved = {}
    for g, m, k, n in REPORT_SHAPES:
        rows = torch.randn(g * m, k, **options, requires_grad=True)
        weight = torch.randn(g, n, k, **options, requires_grad=True)
        counts, grad = torch.full((g,), m, device=device), torch.randn(g * m, n, **options)

        def both(rows=rows, counts=counts, weight=weight, grad=grad) -> Any:
            return torch.autograd.grad(experts.grouped_linear(rows, counts, weight), (rows, weight), grad)

        achieved[f"g{g} m{m} n{n} k{k}"] = round(rate(both, 6 * g * m * k * n), 1)
    return achieved, {shape: round(value / peak, 3) for shape, value in achieved.items()}


def print_header() -> None:
    names = "".join(f"{name:>20}" for name in (OURS, *OTHERS))
    print(f"{'case':<8}{'mode':<10}{'tokens':>7}{names}{'vs best':>9}")


def print_row(case: Case, measured: dict[str, float | None]) -> None:
    cells = [f"{'too big':>20}" if value is None else f"{value:17.2f} ms" for value in measured.values()]
    print(f"{case.name:<8}{case.mode:<10}{case.tokens:>7}{''.join(cells)}{ratio(measured):8.2f}x", flush=True)


def parse_arguments() -> argparse.Namespace:
    small = PRESETS["small"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--hidden", type=int, default=small["hidden_size"])
    parser.add_argument("--width", type=int, default=small["moe_intermediate_size"], help="of an expert")
    parser.add_argument("--experts", type=int, default=PRESETS["llm1"]["n_routed_experts"])
    parser.add_argument("--top-k", type=int, default=PRESETS["llm1"]["num_experts_per_tok"])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each case")
    parser.add_argument("--max-gib", type=float, default=4.0, help="leave out batched_mm where it takes more memory")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few tokens, few experts, few rounds: some seconds")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.experts, options.repeats, options.max_gib = [64, 256], 32, 3, 0.5
    return options


def ratios(results: dict[Case, dict[str, float | None]]) -> dict[str, Any]:
    """Every key of the RESULT line that comes from the table."""
    plain = ("float32", "bfloat16")
    random = {case: measured for case, measured in results.items() if case.name == "random"}
    at_2048 = [ratio(m, ("eager",)) for case, m in random.items() if case.tokens == 2048 and case.mode in plain]
    milliseconds: dict[str, dict[str, float]] = {}
    for case, measured in random.items():
        milliseconds.setdefault(case.mode, {})[str(case.tokens)] = round(measured[OURS] or 0, 2)
    return {
        "ratio_vs_best": worst(results, "random", *plain),
        "ratio_vs_best_skewed": worst(results, "skewed", *plain),
        "ratio_vs_best_autocast": worst(results, "random", "autocast"),
        "ratio_vs_best_tiny": worst(results, "tiny", *plain),
        "ratio_vs_eager_2048": round(min(at_2048), 2) if at_2048 else None,
        "milliseconds": milliseconds,
    }


def main() -> None:
    options = parse_arguments()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = {}
    print_header()
    for case in build_cases(options):
        results[case] = measure(case, device, options.repeats, options.max_gib)
        print_row(case, results[case])
    tflops, share = tflops_at_report_shapes(device, options.repeats) if device.type == "cuda" else (None, None)
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "quick": options.quick,
    }
    print("RESULT " + json.dumps({**ratios(results), "tflops": tflops, "share_of_peak": share, **where}))


if __name__ == "__main__":
    main()

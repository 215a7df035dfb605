"""Chunked log-probabilities against the plain formula, alone and as a model's own head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Dots1ForCausalLM

from dots_align.config import LoraSection, ParallelSection
from dots_align.model import logprobs
from dots_align.model.expert_parallel import shard_model
from dots_align.model.logprobs import IGNORED, chunks, model_logprobs, score_tokens
from dots_align.model.lora import add_adapter
from dots_align.model.packed import pack
from dots_align.runtime import start_processes, stop_processes

NUM_TOKENS, HIDDEN, VOCABULARY = 300, 24, 97
SMALL_CHUNKS = 100 * 4 * VOCABULARY  # bytes: three chunks of 100 tokens


def make(num_tokens: int = NUM_TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(0, VOCABULARY, (num_tokens,), generator=generator)


def plain(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (hidden @ head.T).float() / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value, which is what rounding can reach."""
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().abs().max()) <= tolerance * max(1.0, float(wanted.detach().abs().max()))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation inside makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.elements = max([self.elements, *made])
        return out


@pytest.mark.parametrize("chunk_bytes", [1, SMALL_CHUNKS, 2**30])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_log_softmax_forward_and_backward(chunk_bytes: int, temperature: float) -> None:
    hidden, head, targets = make()
    weights = torch.linspace(-1, 1, NUM_TOKENS)
    wanted = plain(hidden, head, targets, temperature)
    gradients = torch.autograd.grad((wanted * weights).sum(), (hidden, head))
    found = score_tokens(hidden, head, targets, temperature, chunk_bytes=chunk_bytes).logprobs
    assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), (hidden, head)), gradients, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_logits_that_are_kept_for_backward_serve_it_twice(
    kept_bytes: int, with_entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "KEPT_BYTES", kept_bytes)
    hidden, head, targets = make()
    wanted = torch.autograd.grad(plain(hidden, head, targets, 0.6).sum(), (hidden, head))
    found = score_tokens(hidden, head, targets, 0.6, with_entropy=with_entropy).logprobs.sum()
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(found, (hidden, head), retain_graph=True), wanted, strict=True):
            assert_close(a, b)


def test_statistics_are_those_of_the_full_distribution_and_have_no_gradient() -> None:
    hidden, head, targets = make()
    logits = (hidden @ head.T / 0.7).detach()
    targets = torch.where(torch.arange(NUM_TOKENS) % 2 == 0, logits.argmax(-1), targets)
    scores = score_tokens(hidden, head, targets, 0.7, with_entropy=True, with_metrics=True, chunk_bytes=SMALL_CHUNKS)
    assert scores.entropy is not None
    assert scores.mean_logits is not None
    assert scores.is_top1 is not None
    assert_close(scores.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert_close(scores.mean_logits, logits.mean(-1))
    assert scores.is_top1.tolist() == (logits.argmax(-1) == targets).tolist()
    assert not scores.entropy.requires_grad
    assert not scores.mean_logits.requires_grad


def test_of_equally_likely_tokens_the_first_is_the_top_one() -> None:
    scores = score_tokens(torch.zeros(3, HIDDEN), make()[1], torch.tensor([0, 1, VOCABULARY - 1]), with_metrics=True)
    assert scores.is_top1 is not None
    assert scores.is_top1.tolist() == [True, False, False]


def test_no_tensor_has_more_elements_than_a_chunk() -> None:
    hidden, head, targets = make(4000)
    with LargestTensor() as largest:
        scores = score_tokens(hidden, head, targets, with_entropy=True, with_metrics=True, chunk_bytes=SMALL_CHUNKS)
        scores.logprobs.sum().backward()
    assert largest.elements <= max(100 * VOCABULARY, hidden.numel())


def test_chunks_are_even_and_never_so_small_that_products_are_slow() -> None:
    sizes = [rows.stop - rows.start for rows in chunks(1000, 1000, 4 * 1000 * 300)]
    assert sizes == [250] * 4
    assert list(chunks(100, 10**9, 1)) == [slice(0, 50), slice(50, 100)]
    assert list(chunks(0, 1000, 2**20)) == []


@pytest.mark.parametrize("trained", [0, 1])
def test_only_what_trains_gets_a_gradient(trained: int) -> None:
    inputs = make()
    inputs[1 - trained].requires_grad_(False)
    wanted = torch.autograd.grad(plain(*inputs, 1.0).sum(), inputs[trained])[0]
    with LargestTensor() as largest:
        score_tokens(*inputs, chunk_bytes=64 * 4 * VOCABULARY).logprobs.sum().backward()
    assert inputs[1 - trained].grad is None
    assert_close(inputs[trained].grad, wanted)  # pyright: ignore[reportArgumentType]
    assert largest.elements <= max(64 * VOCABULARY, inputs[0].numel())


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = make()
    wanted = score_tokens(*inputs, with_entropy=True)
    with torch.no_grad():
        found = score_tokens(*inputs, with_entropy=True)
    assert not found.logprobs.requires_grad
    assert torch.equal(found.logprobs, wanted.logprobs)
    assert torch.equal(found.entropy, wanted.entropy)  # pyright: ignore[reportArgumentType]


def test_without_a_token_the_sum_is_a_zero_that_can_go_backward() -> None:
    hidden, head, targets = make(0)
    scores = score_tokens(hidden, head, targets, with_entropy=True, with_metrics=True)
    scores.logprobs.sum().backward()
    assert scores.logprobs.shape == (0,)
    assert head.grad is not None
    assert not head.grad.any()


def test_bfloat16_is_as_close_to_fp32_as_the_plain_formula() -> None:
    """Against fp32 arithmetic on the same bfloat16 values: what is left is bfloat16's own rounding."""
    hidden, head, targets = make()
    weights = torch.linspace(-1, 1, NUM_TOKENS)

    def run(score: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.detach().bfloat16().to(dtype).requires_grad_() for t in (hidden, head)]
        logprobs = score(*inputs, targets)
        assert logprobs.dtype == torch.float32
        (logprobs * weights).sum().backward()
        return [logprobs.detach(), *(t.grad.float() for t in inputs if t.grad is not None)]

    exact = run(lambda *a: plain(*a, 1.0), torch.float32)
    theirs = run(lambda *a: plain(*a, 1.0), torch.bfloat16)
    ours = run(lambda *a: score_tokens(*a, chunk_bytes=SMALL_CHUNKS).logprobs, torch.bfloat16)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert float((a - c).norm()) <= 1.1 * float((b - c).norm())


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters() -> None:
    hidden, head, targets = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = plain(hidden, head, targets, 1.0)
        found = score_tokens(hidden, head, targets).logprobs
    assert_close(found, theirs, 0.01)
    assert not torch.equal(found, plain(hidden, head, targets, 1.0))
    gradients = [torch.autograd.grad(x.sum(), (hidden, head)) for x in (found, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, 0.02)


# ------------------------------------------------------------------------------------------------------- model_logprobs


@pytest.fixture
def sequences(token_ids: Callable[..., list[list[int]]]) -> list[list[int]]:
    return token_ids(40, 7, 90)


def labelled(sequences: list[list[int]]) -> tuple[dict, torch.Tensor]:
    """The model's inputs and the targets: every second token of each sequence."""
    targets = [[s[i + 1] if i % 2 and i + 1 < len(s) else IGNORED for i in range(len(s))] for s in sequences]
    return pack(sequences, torch.device("cpu")).model_inputs(), torch.tensor([t for row in targets for t in row])[None]


def by_logits(model: nn.Module, inputs: dict, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = model(**inputs).logits[0] / temperature
    wanted = targets[0] != IGNORED
    return logits.log_softmax(-1)[wanted].gather(-1, targets[0][wanted][:, None]).squeeze(-1)


def gradients(model: nn.Module, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum; leaves none behind (a sharded model's can only be cleared before its next forward)."""
    (logprobs * torch.linspace(0.5, 1, len(logprobs))).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def assert_same(model: nn.Module, reference: nn.Module, sequences: list[list[int]]) -> None:
    """`model_logprobs` of one against the logits of the other, values and gradients, twice in a row."""
    inputs, targets = labelled(sequences)
    wanted = by_logits(reference, inputs, targets, 0.8)
    wanted_gradients = gradients(reference, wanted)
    for _ in range(2):
        found = model_logprobs(model, inputs, targets, 0.8).logprobs
        assert_close(found, wanted)
        found_gradients = gradients(model, found)
        assert found_gradients.keys() == wanted_gradients.keys()
        for name, gradient in found_gradients.items():
            assert_close(gradient, wanted_gradients[name])
    with torch.no_grad():
        assert_close(model_logprobs(model, inputs, targets, 0.8).logprobs, wanted)


def test_model_answers_with_logprobs_and_afterwards_with_logits_again(
    model: Dots1ForCausalLM, sequences: list[list[int]]
) -> None:
    assert_same(model, copy.deepcopy(model), sequences)
    inputs, targets = labelled(sequences)
    assert model(**inputs).logits.shape == (*targets.shape, model.config.vocab_size)
    with pytest.raises(IndexError):
        model_logprobs(model, inputs, targets[:, 1:])
    assert model(**inputs).logits.shape == (*targets.shape, model.config.vocab_size)


def test_only_labelled_positions_go_through_the_head(model: Dots1ForCausalLM, sequences: list[list[int]]) -> None:
    inputs, targets = labelled(sequences)
    with LargestTensor() as largest:
        model_logprobs(model, inputs, targets).logprobs.sum().backward()
    assert int((targets != IGNORED).sum()) * model.config.vocab_size < targets.numel() * model.config.vocab_size
    assert largest.elements < targets.numel() * model.config.vocab_size


def test_gradient_checkpointing_changes_nothing(model: Dots1ForCausalLM, sequences: list[list[int]]) -> None:
    reference = copy.deepcopy(model)
    model.train().gradient_checkpointing_enable()
    assert_same(model, reference, sequences)


def test_under_adapters(model: Dots1ForCausalLM, sequences: list[list[int]]) -> None:
    adapted = add_adapter(model, LoraSection(r=4), "base")
    assert_same(adapted, copy.deepcopy(adapted), sequences)


def test_a_wrapper_that_holds_the_model(model: Dots1ForCausalLM, sequences: list[list[int]]) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    assert_same(Wrapper(model), Wrapper(copy.deepcopy(model)), sequences)


@pytest.fixture
def process_group() -> Iterator[None]:
    assert not dist.is_initialized()
    start_processes(1.0)
    yield
    stop_processes()


def test_a_sharded_model_gathers_its_head_for_it(
    model: Dots1ForCausalLM, sequences: list[list[int]], process_group: None
) -> None:
    reference = copy.deepcopy(model)
    shard_model(model, ParallelSection(), None, "cpu")
    assert isinstance(model.lm_head.weight, DTensor)
    assert_same(model, reference, sequences)

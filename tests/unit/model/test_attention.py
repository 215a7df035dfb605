"""Packed attention: every sequence sees itself and its past, and nothing of its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Dots1ForCausalLM

from dots_align.model.attention import _in_buckets, packed_attention, packed_causal_attention
from dots_align.model.dots1 import load_base_model
from dots_align.model.packed import pack

LENGTHS = (1, 9, 33, 1, 16, 64, 2, 31)


@pytest.fixture(scope="module")
def eager(model_dir: Path) -> Dots1ForCausalLM:
    return load_base_model(model_dir, "float32", "eager", "eager")


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scaling: float):
    """Of each sequence by itself, as the formula has it."""
    attended = []
    for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
        attended.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(attended)


def packed_sequences(lengths: list[int], seed: int, dtype: torch.dtype, heads: int = 2, dim: int = 4):
    """Queries, keys, values, a gradient for the result, and the boundaries."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(sum(lengths), heads, dim, generator=generator).to(dtype) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], grad, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


@pytest.mark.parametrize("attend", [packed_causal_attention, _in_buckets])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 2**31))
def test_equals_softmax_attention_of_each_sequence(attend, lengths: list[int], seed: int) -> None:
    inputs, grad, boundaries = packed_sequences(lengths, seed, torch.float64)
    found, wanted = attend(*inputs, boundaries, 0.3), softmax_attention(*inputs, lengths, 0.3)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    for result, exact in zip(*(torch.autograd.grad(out, inputs, grad) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(result, exact, atol=1e-12, rtol=0)


def continued_attention(q, k, v, lengths: list[int], prefixes: list[int], scaling: float) -> torch.Tensor:
    """Of each segment behind the one it continues, as a sequence by itself."""
    parts = [x.split(lengths) for x in (q, k, v)]
    attended = []
    for number, prefix in enumerate(prefixes):
        chain = [number] if prefix < 0 else [prefix, number]
        whole = [torch.cat([part[i] for i in chain]) for part in parts]
        attended.append(softmax_attention(*whole, [len(whole[0])], scaling)[-lengths[number] :])
    return torch.cat(attended)


@pytest.mark.parametrize("attend", [packed_causal_attention, _in_buckets])
@given(
    groups=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_segments_see_the_whole_of_what_they_continue(attend, groups: list[list[int]], seed: int) -> None:
    """The first of a group is continued by the others."""
    lengths, prefixes = [], []
    for first, *others in groups:
        prefixes += [-1] + [len(prefixes)] * len(others)
        lengths += [first, *others]
    inputs, grad, boundaries = packed_sequences(lengths, seed, torch.float64)
    found = attend(*inputs, boundaries, 0.3, prefixes=torch.tensor(prefixes))
    wanted = continued_attention(*inputs, lengths, prefixes, 0.3)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    for result, exact in zip(*(torch.autograd.grad(out, inputs, grad) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(result, exact, atol=1e-12, rtol=0)


def test_bf16_is_computed_in_fp32() -> None:
    """What is lost is the rounding of the results, and in backward that of the output."""
    lengths, prefixes = [150, 3, 90, 60], [-1, -1, -1, 2]
    inputs, grad, boundaries = packed_sequences(lengths, 0, torch.bfloat16, dim=32)
    found = packed_causal_attention(*inputs, boundaries, 0.2, prefixes=torch.tensor(prefixes))
    found = [found, *torch.autograd.grad(found, inputs, grad)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = continued_attention(*exact_inputs, lengths, prefixes, 0.2)
    exact = [exact, *torch.autograd.grad(exact, exact_inputs, grad.double())]
    assert all(result.dtype == torch.bfloat16 for result in found)
    for result, wanted in zip(found, exact, strict=True):
        assert (result.double() - wanted).norm() < 0.003 * wanted.norm()


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    inputs, _, boundaries = packed_sequences([20, 50, 7], 0, torch.float32)
    together = packed_causal_attention(*inputs, boundaries, 0.3)
    alone = packed_causal_attention(*(x[20:70] for x in inputs), torch.tensor([0, 50]), 0.3)
    assert torch.equal(together[20:70], alone)


def test_a_packed_forward_equals_eager_ones_of_each_sequence(
    model: Dots1ForCausalLM, eager: Dots1ForCausalLM, token_ids
) -> None:
    """Logits and every parameter's gradient, in any order of lengths, with sequences of one token."""
    sequences = token_ids(*LENGTHS, seed=6)  # in which no two experts score alike but for rounding
    packed = model(**pack(sequences, torch.device("cpu")).model_inputs()).logits[0]
    separate = torch.cat([eager(torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences])
    torch.testing.assert_close(packed, separate, atol=2e-4, rtol=0)
    assert packed.std() > 0.1
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1)) / len(packed)
    (packed * weights).sum().backward()
    (separate * weights).sum().backward()
    wanted = {name: p.grad for name, p in eager.named_parameters()}
    for name, parameter in model.named_parameters():
        scale = wanted[name].abs().max().item()
        assert scale > 0
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4 * scale + 1e-7, rtol=1e-3)
    eager.zero_grad()


def test_grouped_query_heads_are_shared() -> None:
    """dots1 is MHA; the interface still serves models with fewer key-value heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=generator) for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 5, 12], dtype=torch.int32)
    module = torch.nn.Module()
    found, _ = packed_attention(module, q, k, v, None, 0.5, cu_seq_lens_q=boundaries)
    wide = (x.repeat_interleave(2, dim=1) for x in (k, v))
    wanted, _ = packed_attention(module, q, *wide, None, 0.5, cu_seq_lens_q=boundaries)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_sdpa(model: Dots1ForCausalLM, model_dir: Path, token_ids, side: str) -> None:
    sdpa = load_base_model(model_dir, "float32", "sdpa", "grouped_mm")
    sequences = token_ids(3, 17, 8)
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(17 - len(sequence), 17)
        ids[row, where], mask[row, where] = torch.tensor(sequence), 1
    with torch.no_grad():
        found, wanted = (m(ids, attention_mask=mask, use_cache=False).logits for m in (model, sdpa))
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=0)
        alone = torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    if side == "right":  # left padding shifts the positions, which RoPE forgives but rounding does not
        torch.testing.assert_close(found[mask.bool()], alone, atol=2e-4, rtol=0)


def test_generate_with_a_cache_equals_sdpa(model: Dots1ForCausalLM, model_dir: Path, token_ids) -> None:
    sdpa = load_base_model(model_dir, "float32", "sdpa", "grouped_mm")
    (prompt,) = token_ids(11)
    answers = [m.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False).tolist() for m in (model, sdpa)]
    assert answers[0] == answers[1]
    assert len(answers[0][0]) > 11


def test_attention_dropout_does_not_open_the_walls_between_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(3))
    module = torch.nn.Module().train()
    boundaries = torch.tensor([0, 6, 12], dtype=torch.int32)
    results = []
    for shift in (0.0, 1.0):
        v[:, :, :6] += shift  # another first sequence
        torch.manual_seed(0)
        found, _ = packed_attention(module, q, k, v, None, 0.5, cu_seq_lens_q=boundaries, dropout=0.1)
        results.append(found[0, 6:])
    torch.testing.assert_close(results[0], results[1])

"""Packed attention: every sequence sees itself and its past, and nothing of its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Dots1ForCausalLM

from dots_align.model.attention import packed_attention, packed_causal_attention
from dots_align.model.dots1 import load_base_model
from dots_align.model.packed import pack

LENGTHS = (1, 9, 33, 1, 16, 64, 2, 31)


@pytest.fixture(scope="module")
def eager(model_dir: Path) -> Dots1ForCausalLM:
    return load_base_model(model_dir, "float32", "eager", "eager")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 2**31))
def test_equals_softmax_attention_of_each_sequence(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, heads, dim, scaling = sum(lengths), 2, 4, 0.3
    q, k, v = (torch.randn(total, heads, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    found = packed_causal_attention(q, k, v, boundaries, scaling)
    for start, length in zip(boundaries.tolist(), lengths, strict=False):
        here = slice(start, start + length)
        scores = torch.einsum("qhd,khd->hqk", q[here], k[here]) * scaling
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        wanted = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[here])
        torch.testing.assert_close(found[here], wanted, atol=1e-12, rtol=0)


def test_a_packed_forward_equals_eager_ones_of_each_sequence(
    model: Dots1ForCausalLM, eager: Dots1ForCausalLM, token_ids
) -> None:
    """Logits and every parameter's gradient, in any order of lengths, with sequences of one token."""
    sequences = token_ids(*LENGTHS)
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

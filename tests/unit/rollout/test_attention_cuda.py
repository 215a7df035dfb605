"""On a GPU: flash attention on pages says what the padded form says, and the engine what transformers says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Dots1ForCausalLM

from dots_align.model.router import keep_router_in_fp32
from dots_align.rollout.attention import _FlashPart, _PaddedPart
from dots_align.rollout.engine import RolloutEngine
from dots_align.types import GenerationRequest, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("causal", [True, False])
def test_flash_on_pages_equals_the_padded_form(causal: bool) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    keys, values = (
        torch.randn(9, 256, 4, 64, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2)
    )
    starts, lengths = np.array([0, 1, 8, 9]), np.array([300, 7, 512])
    tables = np.array([[3, 1], [5, 5], [8, 0]], np.int32)
    query = torch.randn(9, 4, 64, device=device, dtype=torch.bfloat16, generator=generator)
    found = _FlashPart(starts, tables, lengths, causal, device).attend(query, keys, values, 0.125)
    wanted = _PaddedPart(starts, tables, lengths, causal, device).attend(query, keys, values, 0.125)
    torch.testing.assert_close(found[0].float(), wanted[0].float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[1], wanted[1], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_equal_a_teacher_forced_pass(model: Dots1ForCausalLM, token_ids, dtype: torch.dtype) -> None:
    keep_router_in_fp32(model)
    model.to(device="cuda", dtype=dtype)
    prompts = token_ids(40, 7, 90)
    requests = [GenerationRequest(p, 4, SamplingParams(max_tokens=40, seed=i)) for i, p in enumerate(prompts)]
    differences = []
    for prompt, group in zip(prompts, RolloutEngine(model).generate(requests), strict=True):
        for sample in group:
            with torch.no_grad():
                ids = torch.tensor([prompt + sample.response_ids], device="cuda")
                logits = model(ids, use_cache=False).logits[0].float()
            wanted = logits[len(prompt) - 1 : -1].log_softmax(-1).cpu()
            picked = wanted.gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
            differences.append((picked - torch.tensor(sample.logprobs)).abs())
    # The median, since a near-tie of two experts may be rounded the other way.
    assert float(torch.cat(differences).median()) < (1e-4 if dtype == torch.float32 else 3e-2)

"""Everything the engine promises is asked of both of its forwards."""

from __future__ import annotations

import pytest
from transformers import Dots1ForCausalLM

from dots_align.rollout.native import why_not


@pytest.fixture(params=["torch", "native"])
def forward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, loaded_model: Dots1ForCausalLM) -> str:
    """Which forward engines use."""
    if request.param == "torch":
        monkeypatch.setenv("DOTS_ALIGN_NATIVE", "0")
    elif reason := why_not(loaded_model):
        pytest.skip(f"no native forward: {reason}")
    return request.param

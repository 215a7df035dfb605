"""A tiny random dots1 with its tokenizer, made once, whose router has a correction bias that changes its choices."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align.checkpoint import save_model, staged
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.model.dots1 import create_model, load_base_model, preset_config

CONTEXT = 256


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from threads and, on a busy machine, waits for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process hold 8 KiB: what comes near a disk that is full, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(synthetic.corpus(400), 512, CONTEXT)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A published checkpoint: one dense and two MoE layers, 16 experts of which 3 work, a context of 256."""
    config = preset_config(
        "tiny",
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        n_routed_experts=16,
        num_experts_per_tok=3,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = create_model(config, 0, stop_token_ids(tokenizer))
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.4 * torch.rand(buffer.shape, generator=generator) - 0.2)
    final = tmp_path_factory.mktemp("unit") / "model"
    with staged(final, {"stage": "init", "step": 0, "recipe": {}}) as staging:
        save_model(model, tokenizer, staging)
    return final


@pytest.fixture(scope="session")
def loaded_model(model_dir: Path) -> Dots1ForCausalLM:
    """The checkpoint as every stage loads it; shared, so copy it (`model`) before changing anything."""
    return load_base_model(model_dir, "float32", "packed", "grouped_mm").eval()


@pytest.fixture
def model(loaded_model: Dots1ForCausalLM) -> Dots1ForCausalLM:
    return copy.deepcopy(loaded_model)


@pytest.fixture
def token_ids() -> Callable[..., list[list[int]]]:
    """Random token sequences of the given lengths, none of them special."""

    def make(*lengths: int, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, 500, (n,), generator=generator).tolist() for n in lengths]

    return make

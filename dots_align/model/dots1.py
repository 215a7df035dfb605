"""dots1 models: configurations by preset, creation, loading from a checkpoint directory. transformers' own class,
unforked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Dots1Config, Dots1ForCausalLM, GenerationConfig, PreTrainedModel

from dots_align.model import attention, experts
from dots_align.model.fused import use_kernels
from dots_align.model.router import keep_router_in_fp32
from dots_align.model.sharded_io import check_dtypes

# `llm1` is the released shape (142.8 B parameters, 14.0 B active). `tiny` and `small` keep every trait of it (dense
# first layer, sigmoid router with correction bias, top-k of many narrow experts, 2 shared experts, MHA with QK-norm,
# untied head).
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "n_routed_experts": 32,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "moe_intermediate_size": 176,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "n_routed_experts": 32,
        "num_experts_per_tok": 6,
        "max_position_embeddings": 4096,
        "initializer_range": 0.03,
    },
    "llm1": {
        "vocab_size": 152064,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
    },
}
_COMMON: dict[str, Any] = {
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def preset_config(preset: str, **overrides: Any) -> Dots1Config:
    """The configuration of a preset; `overrides` are Dots1Config names."""
    if preset not in PRESETS:
        raise ValueError(f"unknown model preset {preset!r}; choose one of {', '.join(PRESETS)}")
    fields = {**_COMMON, **PRESETS[preset], **overrides}
    fields["num_key_value_heads"] = fields["num_attention_heads"]  # MHA: llama.cpp's dots1 knows nothing else
    fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields["max_window_layers"] = fields["num_hidden_layers"]
    # llm1's theta of 1e7 serves a 32 K context; small contexts learn better with the usual 1e4 frequencies present
    # anyway.
    fields.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 1e7})
    return Dots1Config(**fields)


def create_model(config: Dots1Config, seed: int, stop_token_ids: tuple[int, ...] = ()) -> Dots1ForCausalLM:
    """A freshly initialised model in fp32; the same seed gives the same weights, and the global RNG is left as it
    was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Dots1ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=list(stop_token_ids) or config.eos_token_id, pad_token_id=config.pad_token_id, do_sample=False
    )
    return model.float()


def create_meta_model(preset: str) -> Dots1ForCausalLM:
    """A model of any preset without storage (meta device): for counting and planning; `llm1` is only ever built this
    way.
    """
    with torch.device("meta"):
        return Dots1ForCausalLM(preset_config(preset))


def _attention(name: str) -> str:
    """The recipe's name of an attention implementation, as transformers knows it."""
    return attention.IMPLEMENTATION if name == "packed" else name


def _experts(name: str) -> str:
    return experts.IMPLEMENTATION if name == "grouped" else name


def load_base_model(
    path: str | Path, dtype: str, attn_implementation: str, experts_implementation: str
) -> Dots1ForCausalLM:
    """Loads a full (not adapter) checkpoint directory: safetensors only, no remote code, the global RNG untouched.

    Raises:
        ValueError: a tensor is missing or has the wrong shape, where transformers alone would go on with random values;
        or is quantized, where it would take whole numbers for weights.
    """
    check_dtypes(Path(path))
    wrong = "the checkpoint is not whole, or not of the model its config.json describes"
    with torch.random.fork_rng():
        try:
            loaded: Any = Dots1ForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                attn_implementation=_attention(attn_implementation),
                experts_implementation=_experts(experts_implementation),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
        except RuntimeError as error:
            raise ValueError(f"{path}: {wrong} ({str(error).splitlines()[0]})") from None
    model, info = loaded
    for trouble in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info[trouble])):
            raise ValueError(
                f"{path}: {len(names)} {trouble.replace('_keys', '')} tensors, the first is {names[0]}; {wrong}"
            )
    keep_router_in_fp32(model)
    if attn_implementation == "packed":
        use_kernels(model)
    return model


def meta_model(directory: Path, dtype: str, attn_implementation: str, experts_implementation: str) -> Dots1ForCausalLM:
    """The model of a checkpoint directory without its weights (meta device), to be sharded and then filled."""
    config = Dots1Config.from_pretrained(directory, local_files_only=True)
    config._attn_implementation = _attention(attn_implementation)
    config._experts_implementation = _experts(experts_implementation)
    with torch.device("meta"):
        model = Dots1ForCausalLM(config)
    keep_router_in_fp32(model)
    if attn_implementation == "packed":
        use_kernels(model)
    model.to(getattr(torch, dtype))  # pyright: ignore[reportArgumentType]
    model.config.dtype = getattr(torch, dtype)  # what a checkpoint of it will say it is stored in
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model


def materialize(model: Any, device: torch.device) -> None:
    """Gives a model on meta its storage, of unspecified content, and computes what no checkpoint holds."""
    model.to_empty(device=device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.model.rotary_emb = type(base.model.rotary_emb)(config=base.config, device=device)


def lm_head(model: PreTrainedModel) -> nn.Linear:
    """The language-model head, weight [vocabulary, hidden]."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all, active per token) parameters; of the routed experts only `num_experts_per_tok` are active."""
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    share = model.config.num_experts_per_tok / model.config.n_routed_experts
    return total, round(total - routed * (1 - share))

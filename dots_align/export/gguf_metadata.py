"""What a GGUF file says of a dots1 model besides its weights: shape, router, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import (
    GGML_QUANT_VERSION,
    ExpertGatingFuncType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    size_label,
)
from transformers import Dots1Config

from dots_align.data.chat import END_OF_RESPONSE, END_OF_TEXT
from dots_align.data.tokenizer import QWEN2_SPLIT
from dots_align.export.template import portable_template


def check_convertible(directory: Path, config: Dots1Config) -> None:
    """Raises ValueError for what transformers' dots1 can be told to compute, but llama.cpp's cannot."""
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    required = {
        "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads, "it has no grouped heads"),
        "tie_word_embeddings": (config.tie_word_embeddings, False, "it has no tied head, lm_head.weight is required"),
        "attention_bias": (bool(config.attention_bias), False, "its attention has no bias"),
        "hidden_act": (config.hidden_act, "silu", "its activation is silu"),
        "rope_type": (rope.get("rope_type", "default"), "default", "its rotary embedding is not scaled"),
        "layer_types": (
            "sliding_attention" if "sliding_attention" in (config.layer_types or []) else "full_attention",
            "full_attention",
            "it has no sliding window",
        ),
    }
    for key, (value, expected, reason) in required.items():
        if value != expected:
            raise ValueError(
                f"{directory / 'config.json'}: {key} is {value!r}, llama.cpp's dots1 needs {expected!r}: {reason}"
            )


def add_metadata(writer: GGUFWriter, directory: Path, config: Dots1Config, file_type: LlamaFileType) -> None:
    """All keys of the file; `writer` knows the tensors already.

    Raises:
        ValueError: the tokenizer is missing or is not what llama.cpp's `qwen2` does.
    """
    writer.add_type(GGUFType.MODEL)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    numbers: Any = config  # Dots1Config declares most of them as possibly None
    _add_shape(writer, numbers)
    _add_router(writer, numbers)
    core, settings = (_read_json(directory / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    _add_vocabulary(writer, directory / "tokenizer.json", core, config.vocab_size)
    _add_special_tokens(writer, directory / "tokenizer_config.json", core, settings)
    _add_chat_template(writer, directory, settings)


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope["rope_theta"]))


def _add_router(writer: GGUFWriter, config: Any) -> None:
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_group_count(config.n_group or 1)
    writer.add_expert_group_used_count(config.topk_group or 1)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    # Dots1ForCausalLM has no other scores; without the key llama.cpp takes softmax.
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _add_vocabulary(writer: GGUFWriter, path: Path, core: dict[str, Any], vocab_size: int) -> None:
    """Every id below `vocab_size` has an entry; those the tokenizer never makes are marked unused."""
    model = core["model"]
    if model["type"] != "BPE" or _split_pattern(core) != QWEN2_SPLIT:
        raise ValueError(f"{path}: not a byte-level BPE with Qwen2's splitting; llama.cpp would read other tokens")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    entries = [(text, token, TokenType.NORMAL) for text, token in model["vocab"].items()]
    for added in core["added_tokens"]:
        text = added["content"]
        control = added["special"] or (text.startswith("<|") and text.endswith("|>"))
        entries.append((text, added["id"], TokenType.CONTROL if control else TokenType.USER_DEFINED))
    for text, token, kind in entries:
        if token >= vocab_size:
            raise ValueError(f"{path}: token {text!r} has id {token}, config.json's vocab_size is {vocab_size}")
        tokens[token], kinds[token] = text, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])


def _split_pattern(core: dict[str, Any]) -> str | None:
    """The regular expression that cuts text into words, if that and bytes is all the pre-tokenizer does."""
    steps = (core.get("pre_tokenizer") or {}).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    return steps[0]["pattern"].get("Regex")


def _add_special_tokens(writer: GGUFWriter, path: Path, core: dict[str, Any], settings: dict[str, Any]) -> None:
    ids = {added["content"]: added["id"] for added in core["added_tokens"]}

    def token_id(name: str) -> int | None:
        entry = settings.get(f"{name}_token")
        return ids.get(entry["content"] if isinstance(entry, dict) else entry)

    eos = token_id("eos")
    if eos is None:
        raise ValueError(f"{path}: eos_token is {settings.get('eos_token')!r}, not one of the added tokens")
    end = ids.get(END_OF_TEXT, eos)
    pad = token_id("pad")
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(ids.get(END_OF_RESPONSE, eos))
    writer.add_pad_token_id(end if pad is None else pad)
    # dots.llm1 has no BOS. Without the id llama.cpp takes 11, a comma; without the flags it may add one.
    writer.add_bos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _add_chat_template(writer: GGUFWriter, directory: Path, settings: dict[str, Any]) -> None:
    path = directory / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if not template:
        raise ValueError(f"{directory}: no chat template, neither chat_template.jinja nor in tokenizer_config.json")
    writer.add_chat_template(portable_template(template))

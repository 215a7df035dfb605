"""The dots chat layout: rendering conversations to tokens, and the mask of the assistant's own tokens.

Layout (no newlines, no BOS):
`<|system|>S<|endofsystem|><|userprompt|>U<|endofuserprompt|><|response|>A<|endofresponse|>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dots_align.types import Message

END_OF_TEXT = "<|endoftext|>"
END_OF_RESPONSE = "<|endofresponse|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<|userprompt|>",
    "<|endofuserprompt|>",
    "<|response|>",
    END_OF_RESPONSE,
    "<|system|>",
    "<|endofsystem|>",
)
DEFAULT_SYSTEM = "You are a helpful assistant."

# `{% generation %}` marks what the assistant itself says, the stop token included: transformers builds the loss mask
# from it.
CHAT_TEMPLATE = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{{- '<|system|>' + messages[0]['content'] + '<|endofsystem|>' -}}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{{- '<|system|>" + DEFAULT_SYSTEM + "<|endofsystem|>' -}}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<|userprompt|>' + message['content'] + '<|endofuserprompt|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|response|>' -}}{% generation %}{{- message['content'] + '<|endofresponse|>' -}}{% endgeneration %}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|response|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class EncodedConversation:
    """Invariant: `len(input_ids) == len(labels)`; `labels` is the token itself where the assistant speaks, else
    -100.
    """

    input_ids: list[int]
    labels: list[int]


def layout_tokens() -> list[str]:
    """The special tokens that `CHAT_TEMPLATE` writes."""
    return [token for token in SPECIAL_TOKENS if token in CHAT_TEMPLATE]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to and including `<|response|>`: what the model is asked to continue."""
    encoded: Any = tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def encode_following(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids that messages put behind an answer that has ended, up to and including `<|response|>`. The answer's own
    tokens do not come into it.

    Raises:
        ValueError: the tokenizer's template renders a conversation differently when it goes on.
    """
    before = [Message("user", "?"), Message("assistant", "!")]
    encoded: Any = tokenizer.apply_chat_template(as_dicts(before), return_dict=True)
    until = list(encoded["input_ids"])
    both = encode_prompt(tokenizer, [*before, *messages])
    if both[: len(until)] != until:
        raise ValueError(
            "the tokenizer's chat template changes what came before when a conversation goes on; environments need one "
            "that puts each turn behind the others"
        )
    return both[len(until) :]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> EncodedConversation:
    """Token ids and labels of a conversation; only the assistant's tokens and their stop token carry a label.

    Raises:
        ValueError: the tokenizer's template does not mark what the assistant says, and renders other than the dots
        layout.
    """
    encoded: Any = tokenizer.apply_chat_template(
        as_dicts(messages), chat_template=CHAT_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
    )
    if tokenizer.chat_template != CHAT_TEMPLATE:
        encoded = _own_template(tokenizer, messages, encoded)
    input_ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    labels = [token if own else -100 for token, own in zip(input_ids, mask, strict=True)]
    return EncodedConversation(input_ids, labels)


def _own_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], dots: Any) -> Any:
    """The encoding by the tokenizer's own template; released and exported models carry it without generation marks,
    then ours (`dots`) stands in where it renders the same tokens.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and "generation %}" in template:
        return tokenizer.apply_chat_template(as_dicts(messages), return_assistant_tokens_mask=True, return_dict=True)
    own: Any = tokenizer.apply_chat_template(as_dicts(messages), return_dict=True)
    if list(own["input_ids"]) != list(dots["input_ids"]):
        raise ValueError(
            "the tokenizer's chat template does not mark the assistant's tokens with {% generation %} and differs from "
            "the dots layout; add the marks to it, or no loss mask can be made"
        )
    return dots


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a turn: the tokenizer's EOS and, where it has one, `<|endoftext|>`."""
    ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    return tuple(sorted({i for i in ids if isinstance(i, int) and i != tokenizer.unk_token_id}))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens included. A character of several tokens belongs to the last."""
    texts: list[str] = []
    pending: list[int] = []
    for position, token in enumerate(ids, start=1):
        pending.append(token)
        text = str(tokenizer.decode(pending))
        # Byte-level tokens may end inside a character, of at most four bytes.
        if text.endswith("\ufffd") and len(pending) < 4 and position < len(ids):
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts

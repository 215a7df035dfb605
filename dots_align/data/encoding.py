"""From records to token ids that fit: truncation is counted, what cannot fit is an error that names its record."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dots_align.data.chat import EncodedConversation, encode_conversation, encode_prompt
from dots_align.types import Conversation, Message


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], max_length: int
) -> tuple[list[EncodedConversation], int]:
    """Encodes and cuts at `max_length`.

    Returns:
        the encoded conversations, and how many were cut.

    Raises:
        ValueError: a conversation has no assistant token left within `max_length`, so nothing would be learned from it.
    """
    encoded, cut = [], 0
    for conversation in conversations:
        full = encode_conversation(tokenizer, conversation.messages)
        kept = EncodedConversation(full.input_ids[:max_length], full.labels[:max_length])
        if all(label == -100 for label in kept.labels):
            raise ValueError(
                f"{conversation.source}: the prompt alone is longer than train.max_length={max_length} tokens, no "
                "answer token is left; raise train.max_length or remove this record"
            )
        cut += len(full.input_ids) > max_length
        encoded.append(kept)
    return encoded, cut


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[list[Message], str]], room: int, max_tokens: int
) -> list[list[int]]:
    """Encodes (messages, source) prompts for generation of `max_tokens` tokens in a context of `room`.

    Raises:
        ValueError: a prompt does not fit.
    """
    encoded = []
    for messages, source in prompts:
        ids = encode_prompt(tokenizer, messages)
        if len(ids) + max_tokens > room:
            raise ValueError(
                f"{source}: prompt of {len(ids)} tokens plus max_tokens={max_tokens} is longer than the context of "
                f"{room} tokens; lower max_tokens, or shorten or remove this record"
            )
        encoded.append(ids)
    return encoded

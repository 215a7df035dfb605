"""What fits, what is cut, and what cannot fit."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from dots_align.data.chat import encode_conversation, encode_prompt
from dots_align.data.encoding import encode_conversations, encode_prompts
from dots_align.types import Conversation, Message


def conversation(question: str, answer: str, source: str = "data.jsonl:7") -> Conversation:
    return Conversation([Message("user", question), Message("assistant", answer)], source)


def test_cut_conversations_are_counted_and_keep_their_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    talks = [conversation("1+1", "2"), conversation("1+1", "2" * 100), conversation("1+1", "2" * 90)]
    whole = [encode_conversation(tokenizer, t.messages) for t in talks]
    limit = len(whole[0].input_ids) + 20
    encoded, cut = encode_conversations(tokenizer, talks, limit)
    assert cut == 2
    assert encoded[0] == whole[0]
    for short, full in zip(encoded[1:], whole[1:], strict=True):
        assert short.input_ids == full.input_ids[:limit]
        assert short.labels == full.labels[:limit]


def test_a_conversation_of_exactly_max_length_is_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = conversation("1+1", "2")
    limit = len(encode_conversation(tokenizer, talk.messages).input_ids)
    assert encode_conversations(tokenizer, [talk], limit)[1] == 0


def test_a_prompt_that_fills_max_length_names_its_record(tokenizer: PreTrainedTokenizerFast) -> None:
    talks = [conversation("1", "2", "data.jsonl:1"), conversation("9" * 200, "2", "data.jsonl:2")]
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*train\.max_length=100 .*raise train\.max_length"):
        encode_conversations(tokenizer, talks, 100)


def test_a_prompt_that_fits_exactly_is_taken_and_one_token_more_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [Message("user", "1+1")]
    length = len(encode_prompt(tokenizer, messages))
    assert encode_prompts(tokenizer, [(messages, "a:1")], length + 8, 8) == [encode_prompt(tokenizer, messages)]
    with pytest.raises(ValueError, match=rf"a:1: prompt of {length} tokens plus max_tokens=9 .*{length + 8} tokens"):
        encode_prompts(tokenizer, [(messages, "a:1")], length + 8, 9)

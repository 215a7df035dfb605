"""The dots layout, token by token, and whose tokens carry a label."""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dots_align.data.chat import (
    CHAT_TEMPLATE,
    DEFAULT_SYSTEM,
    SPECIAL_TOKENS,
    EncodedConversation,
    encode_conversation,
    encode_prompt,
    stop_token_ids,
    token_texts,
)
from dots_align.types import Message

TALK = [
    Message("system", "你是助手。"),
    Message("user", "1+1?"),
    Message("assistant", " 2\n"),
    Message("user", "再加1？"),
    Message("assistant", "3"),
]
LAYOUT = (
    "<|system|>你是助手。<|endofsystem|><|userprompt|>1+1?<|endofuserprompt|><|response|> 2\n<|endofresponse|>"
    "<|userprompt|>再加1？<|endofuserprompt|><|response|>3<|endofresponse|>"
)
GENERATION_MARKS = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{{ '<|im_end|>' }}{% endfor %}"
)


def own_parts(tokenizer: PreTrainedTokenizerFast, encoded: EncodedConversation) -> list[str]:
    """The texts of the runs of labelled tokens."""
    runs = groupby(zip(encoded.input_ids, encoded.labels, strict=True), key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([token for token, _ in run]) for own, run in runs if own]


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerFast, tmp_path):
    def make(template: str) -> PreTrainedTokenizerFast:
        tokenizer.save_pretrained(tmp_path)
        copy = AutoTokenizer.from_pretrained(tmp_path)
        copy.chat_template = template
        return copy

    return make


def test_a_conversation_is_laid_out_as_documented(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(encode_conversation(tokenizer, TALK).input_ids) == LAYOUT


def test_without_a_system_message_the_default_one_speaks(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = tokenizer.decode(encode_prompt(tokenizer, [Message("user", "hi")]))
    assert rendered == (f"<|system|>{DEFAULT_SYSTEM}<|endofsystem|><|userprompt|>hi<|endofuserprompt|><|response|>")


def test_no_bos_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.bos_token is None
    assert encode_prompt(tokenizer, TALK[:2])[0] == tokenizer.convert_tokens_to_ids("<|system|>")
    assert tokenizer("12")["input_ids"] == tokenizer.convert_tokens_to_ids(["1", "2"])


def test_prompt_encoding_is_a_prefix_of_the_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_conversation(tokenizer, TALK).input_ids
    for turns in (2, 4):
        prompt = encode_prompt(tokenizer, TALK[:turns])
        assert whole[: len(prompt)] == prompt
        assert prompt[-1] == tokenizer.convert_tokens_to_ids("<|response|>")


def test_labels_cover_the_assistants_text_and_its_stop_token(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_conversation(tokenizer, TALK)
    assert own_parts(tokenizer, encoded) == [" 2\n<|endofresponse|>", "3<|endofresponse|>"]
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


# Two turns, so that what one does to the offsets of the other would show.
@given(st.booleans(), st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=3))
@example(True, [("e\u0301", "e\u0301\u0301"), ("", "")])
@example(False, [("\u0301", "\u0301"), ("한", "\u1112\u1161\u11ab")])
@example(True, [("👩‍👩‍👧", "👩‍👩‍👧")])
def test_labels_fit_any_text(tokenizer: PreTrainedTokenizerFast, system: bool, turns: list[tuple[str, str]]) -> None:
    messages = [Message("system", "s")] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    parts = own_parts(tokenizer, encode_conversation(tokenizer, messages))
    assert parts == [unicodedata.normalize("NFC", answer) + "<|endofresponse|>" for _, answer in turns]


def test_a_template_without_marks_gives_the_same_labels(tokenizer: PreTrainedTokenizerFast, with_template) -> None:
    bare = GENERATION_MARKS.sub("", CHAT_TEMPLATE)
    assert bare != CHAT_TEMPLATE
    assert encode_conversation(with_template(bare), TALK) == encode_conversation(tokenizer, TALK)


def test_a_foreign_template_with_marks_is_obeyed(with_template) -> None:
    foreign = with_template(CHATML)
    encoded = encode_conversation(foreign, TALK[1:3])
    assert foreign.decode(encoded.input_ids) == "<|im_start|>user\n1+1?<|im_end|><|im_start|>assistant\n 2\n<|im_end|>"
    assert own_parts(foreign, encoded) == ["1+1?", " 2\n"]


def test_a_foreign_template_without_marks_is_refused(with_template) -> None:
    foreign = with_template(GENERATION_MARKS.sub("", CHATML))
    with pytest.raises(ValueError, match=r"does not mark the assistant's tokens .* add the marks"):
        encode_conversation(foreign, TALK)


def test_stop_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = tokenizer.convert_tokens_to_ids(["<|endofresponse|>", "<|endoftext|>"])
    assert sorted(stop_token_ids(tokenizer)) == sorted(wanted)


def test_special_tokens_are_one_id_each_and_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS]
    assert [len(ids) for ids in encoded] == [1] * len(SPECIAL_TOKENS)
    assert len({ids[0] for ids in encoded}) == len(SPECIAL_TOKENS)


@given(st.text(max_size=30))
def test_the_texts_of_tokens_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_bytes_that_are_no_text_do_not_swallow_what_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    lead = tokenizer.encode("\U0001f600", add_special_tokens=False)[:1]  # begins a character and never ends it
    after = [*tokenizer.encode("7", add_special_tokens=False), tokenizer.eos_token_id]
    texts = token_texts(tokenizer, [*lead, *after])
    assert len(texts) == 3
    assert "".join(texts) == "\ufffd7<|endofresponse|>"

"""The byte-level tokenizer: nothing is lost, digits stand alone, saving keeps everything."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dots_align.data import synthetic
from dots_align.data.chat import SPECIAL_TOKENS, encode_prompt
from dots_align.data.tokenizer import train_tokenizer
from dots_align.types import Message


@given(st.text())
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Up to NFC, which Qwen2's tokenizer applies."""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("1234+56") == ["1", "2", "3", "4", "+", "5", "6"]


def test_the_vocabulary_is_no_larger_than_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 512
    larger = train_tokenizer(synthetic.corpus(400), 320, 64)
    assert len(larger) == 320
    assert larger.model_max_length == 64


def test_special_tokens_come_last_so_that_text_ids_do_not_move(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|endofresponse|>"


def test_saving_and_loading_keeps_ids_template_and_roles(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [Message("system", "短"), Message("user", "1 + 2 等于几？ 'tis")]
    assert encode_prompt(loaded, messages) == encode_prompt(tokenizer, messages)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (None, tokenizer.eos_token, tokenizer.pad_token)
    assert loaded.model_max_length == tokenizer.model_max_length
    text = "<|userprompt|>a<|im_end|>"
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "a"

"""Files of records: what is read, and what a person is told about what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from dots_align.config import DataSection
from dots_align.data.chat import encode_prompt
from dots_align.data.sources import data_hash, load_conversations, load_preference_pairs, load_prompts
from dots_align.types import Conversation, Message, PreferencePair, Prompt, Response
from reward_models.math import numeric_answer

USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
LOADERS = {"sft": load_conversations, "dpo": load_preference_pairs, "rl": load_prompts}


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (or raw lines) to data.jsonl."""

    def write(*rows: Any) -> Path:
        path = tmp_path / "data.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def section(path: Path | str, **keys: Any) -> DataSection:
    return DataSection(path=str(path), **keys)


def complaint(kind: str, path: Path | str, **keys: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        LOADERS[kind](section(path, **keys), 0)
    return str(caught.value)


def test_conversations_from_messages_or_prompt_and_response(jsonl) -> None:
    path = jsonl({"messages": [USER, ASSISTANT]}, "", {"prompt": "你好", "response": "嗨"})
    assert load_conversations(section(path), 0) == [
        Conversation([Message("user", "1+1?"), Message("assistant", "2")], f"{path}:1"),
        Conversation([Message("user", "你好"), Message("assistant", "嗨")], f"{path}:3"),
    ]


def test_preference_pairs_from_text_or_trls_lists(jsonl) -> None:
    path = jsonl(
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "3"}]},
    )
    assert load_preference_pairs(section(path), 0) == [
        PreferencePair([Message("user", "q")], "good", "bad", f"{path}:1"),
        PreferencePair([Message("user", "1+1?")], "2", "3", f"{path}:2"),
    ]


def test_conversations_as_sharegpt_and_trl_write_them(jsonl) -> None:
    turns = [("system", "s"), ("human", "1+1?"), ("gpt", "2")]
    path = jsonl(
        {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]},
        {"prompt": [USER], "response": [ASSISTANT]},
    )
    first, second = load_conversations(section(path, messages_field="conversations"), 0)
    assert first.messages == [Message("system", "s"), Message("user", "1+1?"), Message("assistant", "2")]
    assert second.messages == first.messages[1:]


def test_preference_pairs_whose_answers_bring_the_conversation(jsonl) -> None:
    """UltraFeedback and others repeat the prompt in `chosen` and `rejected`, with or without a prompt of its own."""
    system, again = {"role": "system", "content": "s"}, {"role": "user", "content": "sure?"}
    talk = [system, USER, ASSISTANT, again]
    answers = {name: [*talk, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    path = jsonl(answers, {"prompt": "1+1?", **answers}, {"prompt": talk[:2], **answers})
    prompt = [Message(m["role"], m["content"]) for m in talk]
    for pair in load_preference_pairs(section(path), 0):
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "chosen", "rejected")


def test_prompts_take_the_question_and_leave_a_recorded_answer_out(jsonl) -> None:
    path = jsonl({"messages": [USER, ASSISTANT], "answer": 2}, {"prompt": "q", "answer": "x"})
    assert load_prompts(section(path), 0) == [
        Prompt([Message("user", "1+1?")], "2", f"{path}:1"),
        Prompt([Message("user", "q")], "x", f"{path}:2"),
    ]


def test_fields_can_be_named_and_samples_limited(jsonl) -> None:
    path = jsonl(*({"q": f"q{i}", "a": f"a{i}"} for i in range(5)))
    records = load_conversations(section(path, prompt_field="q", response_field="a", max_samples=3), 0)
    assert [r.messages[1].content for r in records] == ["a0", "a1", "a2"]


@pytest.mark.parametrize("kind", LOADERS)
def test_system_prompt_goes_in_front_of_records_without_their_own(jsonl, kind: str) -> None:
    rest = {"chosen": "2", "rejected": "3", "answer": "2"}
    own = [{"role": "system", "content": "own"}, USER]
    path = jsonl({"messages": [USER, ASSISTANT], **rest}, {"messages": [*own, ASSISTANT], **rest})
    records = LOADERS[kind](section(path, system_prompt="recipe's"), 0)
    firsts = [getattr(r, "messages", None) or r.prompt for r in records]
    assert [messages[0] for messages in firsts] == [Message("system", "recipe's"), Message("system", "own")]
    (synthetic,) = LOADERS[kind](
        section(
            {"sft": "synthetic:sft", "dpo": "synthetic:preference", "rl": "synthetic:prompts"}[kind],
            system_prompt="s",
            max_samples=1,
        ),
        0,
    )
    assert (getattr(synthetic, "messages", None) or synthetic.prompt)[0] == Message("system", "s")


def test_parquet_holds_the_same_records(tmp_path: Path, jsonl) -> None:
    rows = [{"messages": [USER, ASSISTANT], "answer": "2"}, {"messages": [USER], "answer": "三"}]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = load_prompts(section(path), 0)
    expected = load_prompts(section(jsonl(*rows)), 0)
    assert [(p.messages, p.answer) for p in found] == [(p.messages, p.answer) for p in expected]
    assert [p.source for p in found] == [f"{path}:row 1", f"{path}:row 2"]


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 not")
    assert complaint("sft", path).startswith(f"{path}: not a readable Parquet file")


def test_missing_file(tmp_path: Path) -> None:
    assert complaint("sft", tmp_path / "none.jsonl").startswith(f"data.path={tmp_path / 'none.jsonl'}: no such file")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("array.json", b'[\n{"prompt": "q"}\n]', "a JSON array, not a record a line; jq -c '.[]'"),
        ("array.json", b'[{"prompt": "q"}]', "a JSON array, not a record a line; jq -c '.[]'"),
        ("data.jsonl.gz", b"\x1f\x8b\x08\x00", "compressed; gunzip it"),
    ],
)
def test_files_that_hold_records_in_another_way(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert told in complaint("sft", path)


def test_a_directory_and_a_name_on_the_hub(tmp_path: Path) -> None:
    assert "this is a directory; give a JSONL or Parquet file in it" in complaint("sft", tmp_path)
    assert "hf download --repo-type dataset openai/gsm8k" in complaint("sft", "openai/gsm8k")


def test_empty_file(jsonl) -> None:
    path = jsonl("", "  ")
    assert complaint("sft", path).startswith(f"{path}: the data set is empty")


GOOD = {"messages": [USER, ASSISTANT], "chosen": "a", "rejected": "b", "answer": "2"}


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("sft", '{"messages": [}', "broken JSON at column 15"),
        ("sft", "[1, 2]", "expected a JSON object, found list"),
        ("sft", '"text"', "expected a JSON object, found str"),
        ("sft", {"messages": []}, "'messages' must be a non-empty list"),
        ("sft", {"messages": "hi"}, "'messages' must be a non-empty list"),
        ("sft", {"messages": ["hi"]}, "messages[0] must be an object with `role` and `content`, found str"),
        (
            "sft",
            {"messages": [USER, {"content": "2"}]},
            "messages[1] has no `role`; give one of system, user, assistant",
        ),
        ("sft", {"messages": [{"role": "bot", "content": "2"}]}, "messages[0] has the unknown role 'bot'"),
        ("sft", {"messages": [USER, {"role": "assistant"}]}, "messages[1]: `content` must be text, found nothing"),
        ("sft", {"messages": [USER, {"role": "system", "content": "s"}]}, "a system message may only come first"),
        ("sft", {"messages": [USER]}, "no assistant message, so there is nothing to learn"),
        (
            "sft",
            {"question": "q", "response": "a"},
            "no field 'prompt' (the record has 'question', 'response'); set data.prompt_field",
        ),
        (
            "sft",
            {"prompt": "q", "reply": "a"},
            "no field 'response' (the record has 'prompt', 'reply'); set data.response_field",
        ),
        (
            "sft",
            {"conversations": []},
            "neither 'messages' nor 'prompt' and 'response' (the record has 'conversations'); set data.messages_field",
        ),
        ("sft", {"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1] is an empty answer"),
        ("sft", {"messages": [USER, {"role": "tool", "content": "2"}]}, "messages[1] has the unknown role 'tool'"),
        ("sft", {"messages": [{"from": "bot", "value": "2"}]}, "messages[0] has the unknown role 'bot'"),
        ("sft", {"messages": [{"role": "user", "content": [{"text": "?"}]}]}, "`content` must be text, found list"),
        ("sft", '{"messages": ' + "[" * 100_000, "too deeply nested"),
        ("sft", '{"prompt": ' + "1" * 5000 + "}", "cannot be read"),
        (
            "dpo",
            {"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "other"}, ASSISTANT]},
            "'chosen' and 'rejected' differ before their last message",
        ),
        (
            "dpo",
            {"prompt": [ASSISTANT, USER], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
            "'chosen' and 'rejected' do not begin with the messages of 'prompt'",
        ),
        ("sft", {"prompt": " \n", "response": "a"}, "field 'prompt' is empty"),
        ("sft", {"prompt": "q", "response": ""}, "field 'response' is empty"),
        ("sft", {"prompt": 3, "response": "a"}, "field 'prompt' must be text, found int"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same text"),
        (
            "dpo",
            {"prompt": "q", "chosen": "a"},
            "no field 'rejected' (the record has 'prompt', 'chosen'); set data.rejected_field",
        ),
        ("dpo", {"prompt": "q", "chosen": [USER], "rejected": "a"}, "'chosen' must end with an assistant message"),
        ("dpo", {"prompt": [USER, ASSISTANT], "chosen": "a", "rejected": "b"}, "a prompt must end with a user message"),
        ("rl", {"messages": [ASSISTANT], "answer": "2"}, "a prompt must end with a user message"),
        (
            "rl",
            {"prompt": "q", "solution": "2"},
            "no field 'answer' (the record has 'prompt', 'solution'); set data.answer_field",
        ),
    ],
)
def test_complaints_name_file_and_line(jsonl, kind: str, row: Any, told: str) -> None:
    path = jsonl(GOOD, GOOD, row, GOOD)
    message = complaint(kind, path)
    assert message.startswith(f"{path}:3: ")
    assert told in message


def test_lines_after_max_samples_are_not_read(jsonl) -> None:
    assert len(load_prompts(section(jsonl(GOOD, "{broken"), max_samples=1), 0)) == 1


@pytest.mark.parametrize(
    ("kind", "path"), [("sft", "prompts"), ("dpo", "sft"), ("rl", "preference"), ("sft", "nothing")]
)
def test_a_synthetic_set_of_another_stage_says_which_to_take(kind: str, path: str) -> None:
    told = complaint(kind, f"synthetic:{path}")
    assert told.startswith(f"data.path=synthetic:{path}: this stage takes synthetic:")


def test_the_synthetic_seed_is_the_recipes_unless_the_data_has_its_own() -> None:
    def take(recipe_seed: int, **keys: Any) -> str:
        return data_hash(load_prompts(section("synthetic:prompts", max_samples=20, **keys), recipe_seed))

    assert take(1) == take(1)
    assert take(1) != take(2)
    assert take(1, seed=5) == take(2, seed=5)


def test_data_hash_depends_on_content_and_order() -> None:
    a, b = Prompt([Message("user", "a")], "1"), Prompt([Message("user", "b")], "1")
    assert data_hash([a, b]) == data_hash([a, b])
    assert len({data_hash([a, b]), data_hash([b, a]), data_hash([a]), data_hash([])}) == 4


def test_text_that_is_no_unicode_names_its_record(jsonl, tokenizer: PreTrainedTokenizerFast) -> None:
    """`\\ud83d` alone: half an emoji, as left behind by cutting text at a length in UTF-16."""
    path = jsonl('{"prompt": "\\ud83d", "answer": "1"}')
    try:
        (prompt,) = load_prompts(section(path), 0)
        encode_prompt(tokenizer, prompt.messages)
    except ValueError as error:
        assert str(error).startswith(f"{path}:1")  # noqa: PT017 - either refuse it, or make something of it


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "q", "response": "\u00e9"}\n'.encode("latin-1"))
    assert str(path) in complaint("sft", path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    """As Windows' editors and PowerShell write it."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a"}), encoding="utf-8-sig")
    assert len(load_conversations(section(path), 0)) == 1


def test_gsm8k(shared_data: Path) -> None:
    keys = {"prompt_field": "question", "answer_field": "answer", "response_field": "answer"}
    path = shared_data / "gsm8k" / "train.jsonl"
    talks = load_conversations(section(path, **keys), 0)
    prompts = load_prompts(section(path, **keys), 0)
    assert len(talks) == len(prompts) == 7473
    assert talks[-1].source == f"{path}:7473"
    assert talks[0].messages[0].role == "user"
    assert "#### " in talks[0].messages[1].content
    # The reference solutions are right by the reward that reads them, and rarely by that of the next question.
    answers = [p.answer or "" for p in prompts]
    right = [numeric_answer(Response(p, a)) for p, a in zip(prompts, answers, strict=True)]
    shifted = [numeric_answer(Response(p, a)) for p, a in zip(prompts, answers[1:], strict=False)]
    assert sum(right) == 7473
    assert sum(shifted) / len(shifted) < 0.05


def test_an_answer_of_several_fields_is_a_json_object(jsonl) -> None:
    path = jsonl({"prompt": "q", "test_list": ["assert f() == '你'"], "setup": ""})
    (prompt,) = load_prompts(section(path, answer_field=("test_list", "setup")), 0)
    assert json.loads(prompt.answer or "") == {"test_list": ["assert f() == '你'"], "setup": ""}
    assert "你" in (prompt.answer or "")
    (prompt,) = load_prompts(section(path, answer_field="test_list"), 0)
    assert json.loads(prompt.answer or "") == ["assert f() == '你'"]
    assert "no field 'tests'" in complaint("rl", path, answer_field=("test_list", "tests"))

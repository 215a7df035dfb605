"""The 25 kinds of verifiable instructions: for each, what follows it and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.instruction import (
    _CHECKS,
    count_sentences,
    count_words,
    followed_loose,
    followed_strict,
    language_of,
    share_followed,
)


def response(text: str, *instructions: tuple[str, dict[str, Any]]) -> Response:
    answer = {"instruction_id_list": [name for name, _ in instructions], "kwargs": [k for _, k in instructions]}
    return Response(Prompt([Message("user", "q")], json.dumps(answer), "ifeval.jsonl:3"), text)


CAPITALS = "ALL OF THIS IS WRITTEN IN CAPITAL LETTERS AND IN ENGLISH, AS IT WAS ASKED FOR."
# kind, parameters, texts that follow it, texts that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["mom", "mother"]}, ["Mom is a MOTHER."], ["mom", "father"]),
    (
        "keywords:frequency",
        {"keyword": "story", "frequency": 2, "relation": "at least"},
        ["A story of a Story"],
        ["One story."],
    ),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, ["one a"], ["a a"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["rock", "禁止"]},
        ["a rocket", "允许"],
        ["We Rock!", "这里禁止停车"],
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, ["# #"], ["#"]),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 2, "let_relation": "less than"}, ["T"], ["Tt"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Heute gehe ich mit meinen Freunden in die Schule."],
        ["Today I go to school with my friends.", "我今天和朋友们一起去学校。"],
    ),
    ("change_case:english_capital", {}, [CAPITALS, "YES!"], [CAPITALS.title(), CAPITALS + "a", "ДА", "123"]),
    ("change_case:english_lowercase", {}, [CAPITALS.lower(), "yes."], [CAPITALS, "Yes.", "да"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and the U.S. agree"],
        ["NASA agrees"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["Only ONE word"],
        ["NOT SO"],
    ),
    ("punctuation:no_comma", {}, ["No; none."], ["Well, one.", "有，一个。"]),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["one two, three-four", "我有四个字"],
        ["one two three"],
    ),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, ["one two three"], ["a b c d"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "一。二！三？"],
        ["One. Two!", "Mr. Smith paid 3.5 dollars. He left."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["Only one, by Dr. No.", "no mark"],
        ["One. Two."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["One.\n***\nTwo.", "***\nOne.\n***\nTwo.\n***"],
        ["One.\n\nTwo.", "One.\n***\nTwo.\n***\nThree.", "One.\n***\n***\nTwo."],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ['One.\n\n"Weekend" it is.'],
        ["Weekend.\n\nTwo.", "One.\n\nWeekends.", "One.\n\nWeekend\n\nThree.", "One.\nWeekend"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] at [address]"],
        ["[name]", "[] []", "name"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. I stay.", "Bye.\np. s. I stay"],
        ["Bye.", "ps I stay"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S. More."], ["Bye.\nP.S. More."]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["List:\n* one\n* two", "- one\n- two"],
        ["* one", "* one\n* two\n* three", "**one**\n**two**", "---\n---"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well. My answer is maybe."],
        ["Yes.", "My answer is perhaps."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and *two*"],
        ["*one*", "** ** and * *", "one * two * three", "**one**"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION one SECTION two"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', '```\n{"a": 1}\n```'],
        ["{a: 1}", 'Here: {"a": 1}', '```json\n{"a": 1}'],
    ),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["A title", "<<>>", "<< >>", "<A title>"]),
    (
        "combination:two_responses",
        {},
        ["One.\n******\nTwo.", "******\nOne.\n******\nTwo."],
        ["One.", "One.\n******\nOne.", "One.\n******\n", "One.\n******\nTwo.\n******\nThree."],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a haiku."},
        ["write a haiku. Here it is."],
        ["Here it is: Write a haiku."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Is there anything else?"},
        ["Done. Is there anything ELSE?", '"Is there anything else?"\n'],
        ["Is there anything else? No."],
    ),
    ("startend:quotation", {}, ['"All of it."', ' "a" and "b" '], ['"Begun', '"', "none"]),
]


def test_all_25_kinds_are_there() -> None:
    assert {name for name, *_ in CASES} == set(_CHECKS)
    assert len(_CHECKS) == 25


@pytest.mark.parametrize(("name", "parameters", "right", "wrong"), CASES, ids=[name for name, *_ in CASES])
def test_each_kind(name: str, parameters: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    assert {text: followed_strict(response(text, (name, parameters))) for text in right} == dict.fromkeys(right, 1.0)
    assert {text: followed_strict(response(text, (name, parameters))) for text in wrong} == dict.fromkeys(wrong, 0.0)
    assert followed_strict(response(right[0], (f"en:{name}", parameters))) == 1


def test_several_instructions() -> None:
    both = (("punctuation:no_comma", {}), ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}))
    assert [followed_strict(response(text, *both)) for text in ("one two three", "one, two three", "one")] == [1, 0, 0]
    assert [share_followed(response(text, *both)) for text in ("one two three", "one, two three", "a,")] == [1, 0.5, 0]


def test_loosely_an_introduction_or_stars_do_not_matter() -> None:
    json_only = ("detectable_format:json_format", {})
    text = 'Sure, here it is:\n{"a": 1}\nI hope that helps.'
    assert followed_strict(response(text, json_only)) == 0
    assert followed_loose(response(text, json_only)) == 1
    assert followed_loose(response("**" + text, ("startend:quotation", {}))) == 0
    assert followed_loose(response('**"quoted"**', ("startend:quotation", {}))) == 1


def test_each_instruction_may_hold_in_another_variant() -> None:
    two = (("detectable_format:json_format", {}), ("keywords:existence", {"keywords": ["sure"]}))
    assert followed_loose(response('Sure:\n{"a": 1}', *two)) == 1


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_follows_nothing(text: str) -> None:
    assert followed_strict(response(text, ("punctuation:no_comma", {}))) == 0
    assert followed_loose(response(text, ("punctuation:no_comma", {}))) == 0


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "instruction_id_list"),
        ("[]", "instruction_id_list"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}', "as many kwargs"),
        ('{"instruction_id_list": [], "kwargs": []}', "nothing to follow"),
        (
            '{"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}',
            "unknown instruction 'punctuation:no_coma'",
        ),
    ],
)
def test_bad_references_say_where_and_what(answer: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        followed_strict(Response(Prompt([Message("user", "q")], answer, "ifeval.jsonl:3"), "x"))
    assert str(caught.value).startswith("ifeval.jsonl:3: ")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two. Three.", 3),
        ("Really?! Yes... No.", 3),
        ("It costs 3.50 dollars, i.e. much. Dr. A. Smith says so.", 2),
        ('He said: "Go." She went.', 2),
        ("1. First thing.\n2. Second thing.", 2),
        ("第一句。第二句！第三句？第四句", 4),
        ("“好。”他说。", 2),
        ("See example.com today. Done", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_words() -> None:
    assert [count_words(text) for text in ("", "it's two", "你好世界", "GPT模型2个")] == [0, 3, 4, 5]


LANGUAGES = {
    "th": "ประเทศไทยมีอาหารอร่อยมากมายและผู้คนเป็นมิตรกับนักท่องเที่ยวเสมอ",
    "pa": "ਮੈਂ ਅੱਜ ਸਕੂਲ ਜਾ ਰਿਹਾ ਹਾਂ ਅਤੇ ਮੇਰੇ ਦੋਸਤ ਵੀ ਆ ਰਹੇ ਹਨ।",
    "mr": "मी आज शाळेत जात आहे आणि माझे मित्र सुद्धा येत आहेत. आम्ही एकत्र अभ्यास करणार आहोत.",
    "ar": "أذهب اليوم إلى المدرسة مع أصدقائي وسندرس معا.",
    "hi": "मैं आज स्कूल जा रहा हूँ और मेरे दोस्त भी आ रहे हैं। हम साथ में पढ़ाई करेंगे।",
    "it": "Oggi vado a scuola con i miei amici e studieremo insieme la matematica.",
    "sw": "Leo ninaenda shuleni pamoja na marafiki zangu na tutasoma hisabati pamoja.",
    "ur": "میں آج اسکول جا رہا ہوں اور میرے دوست بھی آ رہے ہیں۔ ہم مل کر پڑھیں گے۔",
    "fa": "من امروز با دوستانم به مدرسه می‌روم و با هم ریاضی خواهیم خواند.",
    "vi": "Hôm nay tôi đi học cùng các bạn và chúng tôi sẽ học toán với nhau.",
    "ta": "நான் இன்று என் நண்பர்களுடன் பள்ளிக்குச் செல்கிறேன்.",
    "de": "Heute gehe ich mit meinen Freunden in die Schule und wir lernen zusammen.",
    "bg": "Днес отивам на училище с приятелите си и ще учим заедно математика.",
    "te": "నేను ఈరోజు నా స్నేహితులతో కలిసి పాఠశాలకు వెళ్తున్నాను.",
    "ne": "म आज मेरा साथीहरूसँग विद्यालय जाँदैछु र हामी सँगै पढ्नेछौं। यो धेरै राम्रो छ।",
    "fi": "Tänään menen kouluun ystävieni kanssa ja opiskelemme yhdessä matematiikkaa.",
    "bn": "আমি আজ আমার বন্ধুদের সাথে স্কুলে যাচ্ছি এবং আমরা একসাথে পড়ব।",
    "ru": "Сегодня я иду в школу с друзьями, и мы будем вместе учить математику.",
    "kn": "ನಾನು ಇಂದು ನನ್ನ ಸ್ನೇಹಿತರೊಂದಿಗೆ ಶಾಲೆಗೆ ಹೋಗುತ್ತಿದ್ದೇನೆ.",
    "pt": "Hoje vou à escola com os meus amigos e vamos estudar matemática juntos.",
    "gu": "હું આજે મારા મિત્રો સાથે શાળાએ જાઉં છું.",
    "ko": "나는 오늘 친구들과 함께 학교에 가서 수학을 공부할 것이다.",
    "en": "Today I go to school with my friends and we will study mathematics together.",
    "zh": "我今天和朋友们一起去学校学习数学。",
}


def test_every_language_that_ifeval_asks_for() -> None:
    assert {language_of(text) for text in LANGUAGES.values()} == set(LANGUAGES)
    assert all(language_of(text) == code for code, text in LANGUAGES.items())


def test_every_prompt_of_ifeval_can_be_scored(shared_data: Path) -> None:
    rows = (shared_data / "ifeval" / "en_input_data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 541
    scores = []
    for row in map(json.loads, rows):
        answer = json.dumps({key: row[key] for key in ("instruction_id_list", "kwargs")})
        one = Response(Prompt([Message("user", row["prompt"])], answer), "The weather is fine today and so am I.")
        assert followed_strict(one) <= followed_loose(one)
        assert followed_strict(one) == (share_followed(one) == 1)
        scores.append(share_followed(one))
    assert 0.05 < sum(scores) / len(scores) < 0.5  # a sentence about nothing follows few of them

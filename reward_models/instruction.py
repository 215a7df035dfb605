"""Rewards for following instructions that a program can check: the 25 kinds of IFEval (arXiv:2311.07911).

The reference answer is a JSON object of `instruction_id_list`, names such as `length_constraints:number_words`, and
`kwargs`, the parameters of each (`data.answer_field: [instruction_id_list, kwargs]`). Range: 0 to 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from dots_align.types import Response, reward_range

Check = Callable[..., bool]
_CHECKS: dict[str, Check] = {}
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"


@reward_range(0, 1)
def followed_strict(response: Response) -> float:
    """1 if every instruction is followed to the letter."""
    return float(all(_followed(response.text, *i) for i in _instructions(response)))


@reward_range(0, 1)
def followed_loose(response: Response) -> float:
    """1 if every instruction is followed, each perhaps only without the first line, the last line or any stars."""
    variants = list(_variants(response.text))
    return float(all(any(_followed(v, *i) for v in variants) for i in _instructions(response)))


@reward_range(0, 1)
def share_followed(response: Response) -> float:
    """The share of the instructions that are followed to the letter."""
    found = [_followed(response.text, *i) for i in _instructions(response)]
    return sum(found) / len(found)


def _instructions(response: Response) -> list[tuple[str, dict[str, Any]]]:
    where = response.prompt.source or "a prompt"
    try:
        answer = json.loads(response.prompt.answer or "")
        names, parameters = answer["instruction_id_list"], answer["kwargs"]
        found = list(zip((_plain_name(n) for n in names), parameters, strict=True))
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{where}: the reference answer must hold instruction_id_list and as many kwargs; set data.answer_field to "
            "[instruction_id_list, kwargs]"
        ) from None
    if not found:
        raise ValueError(f"{where}: no instructions, so there is nothing to follow")
    if unknown := [name for name, _ in found if name not in _CHECKS]:
        raise ValueError(f"{where}: unknown instruction {unknown[0]!r}; there are {', '.join(_CHECKS)}")
    return found


def _plain_name(name: str) -> str:
    return name.removeprefix("en:").removeprefix("zh:")


def _followed(text: str, name: str, parameters: dict[str, Any]) -> bool:
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    return bool(text.strip()) and _CHECKS[name](text, **given)


def _variants(text: str) -> Iterator[str]:
    lines = text.split("\n")
    for variant in (text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])):
        yield variant.strip()
        yield variant.replace("*", "").strip()


def _check(name: str) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        _CHECKS[name] = function
        return function

    return register


def _holds(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"unknown relation {relation!r}; there are `at least` and `less than`")
    return count >= wanted if relation == "at least" else count < wanted


# ------------------------------------------------------------------------------------------------------------ keywords


@_check("keywords:existence")
def _keywords(text: str, keywords: list[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


@_check("keywords:frequency")
def _keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.lower().count(keyword.lower()), relation, frequency)


@_check("keywords:forbidden_words")
def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """Whole words; in Chinese, which has no spaces, wherever they stand."""
    for word in forbidden_words:
        edge = "" if re.search(f"[{_HAN}]", word) else r"\b"
        if re.search(f"{edge}{re.escape(word)}{edge}", text, re.IGNORECASE):
            return False
    return True


@_check("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# --------------------------------------------------------------------------------------------------- language, letters


@_check("language:response_language")
def _response_language(text: str, language: str) -> bool:
    return language_of(text) == language.partition("-")[0]


def language_of(text: str) -> str:
    """The language of a text as ISO 639-1 (`zh`, `en`), as well as its letters tell."""
    import py3langid  # its model takes a moment to load, and most instructions do without

    # In lower case: it has seen few texts in capitals.
    return str(py3langid.classify(text.lower())[0])


def _is_english(text: str) -> bool:
    """Of a few words, letters are all that can be said."""
    letters = [c for c in text if c.isalpha()]
    return all(c.isascii() for c in letters) if len(letters) < 40 else language_of(text) == "en"


@_check("change_case:english_capital")
def _english_capital(text: str) -> bool:
    return text.isupper() and _is_english(text)


@_check("change_case:english_lowercase")
def _english_lowercase(text: str) -> bool:
    return text.islower() and _is_english(text)


@_check("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"[^\W_][\w'’.&-]*", text)
    return _holds(sum(word.isupper() for word in words), capital_relation, capital_frequency)


@_check("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return not re.search("[,，]", text)


# -------------------------------------------------------------------------------------------------------------- length


@_check("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _holds(count_words(text), relation, num_words)


def count_words(text: str) -> int:
    """Runs of letters and digits; in Chinese every character is one."""
    return len(re.findall(rf"[{_HAN}]|[^\W{_HAN}]+", text))


@_check("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(text), relation, num_sentences)


_ABBREVIATIONS = (
    r"\b(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|inc|ltd|co|no|fig|al|approx|a\.m|p\.m|u\.s|[A-Z])\.$"
)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)|[。！？…]+[”’」』）]*")


def count_sentences(text: str) -> int:
    """Sentences of English or Chinese: ended by a mark (not of an abbreviation or a number) or by the text's end."""
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(text):
        sentence = text[start : match.end()]
        if match[0] == "." and re.search(_ABBREVIATIONS, sentence, re.IGNORECASE) and text[match.end() :].strip():
            continue
        if re.search(r"[^\W_]", re.sub(r"^\s*\d+\.", "", sentence)):  # not the number of a list item
            count, start = count + 1, match.end()
    return count + bool(re.search(r"[^\W_]", text[start:]))


@_check("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Between markdown dividers of three stars; none in the middle may be empty."""
    parts = [part.strip() for part in re.split(r"(?<!\*)\*\*\*(?!\*)", text)]
    while parts and not parts[0]:
        parts = parts[1:]
    while parts and not parts[-1]:
        parts = parts[:-1]
    return all(parts) and len(parts) == num_paragraphs


@_check("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    return words[0].strip("\"'“”‘’*_.,;:!?()").lower() == first_word.lower()


# ------------------------------------------------------------------------------------------------- content and markdown


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


@_check("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    """At the beginning of a line, with or without spaces between its letters."""
    letters = [re.escape(c) for c in postscript_marker.rstrip(".") if not c.isspace()]
    return bool(re.search(r"(?:^|\s)" + r"\s?".join(letters), text, re.IGNORECASE))


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-(?!-))\s*\S", text, re.MULTILINE)) == num_bullets


@_check("detectable_format:constrained_response")
def _one_of_three(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    return (
        len(re.findall(r"\*\*[^*\n]*[^*\s][^*\n]*\*\*|(?<!\*)\*[^*\n]*[^*\s][^*\n]*\*(?!\*)", text)) >= num_highlights
    )


@_check("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\b{re.escape(section_spliter.strip())}\s+\d+", text)) >= num_sections


@_check("detectable_format:json_format")
def _json(text: str) -> bool:
    inside = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(inside[1] if inside else text)
    except ValueError:
        return False
    return True


@_check("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip(" <>") for title in re.findall(r"<<([^\n]+?)>>", text))


@_check("combination:two_responses")
def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inner = [part for number, part in enumerate(parts) if part or 0 < number < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


@_check("combination:repeat_prompt")
def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_check("startend:end_checker")
def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_check("startend:quotation")
def _quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'

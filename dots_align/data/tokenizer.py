"""A byte-level BPE tokenizer in the layout of dots.llm1's (Qwen2 pre-tokenizer, dots special tokens and chat
template).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dots_align.data.chat import CHAT_TEMPLATE, END_OF_RESPONSE, END_OF_TEXT, SPECIAL_TOKENS, layout_tokens

# Qwen2's split: digits stand alone, so that numbers are read digit by digit.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of at most `vocab_size` entries, special tokens included, on `texts`.

    Every byte is in the alphabet, so any text can be encoded. No BOS is ever added (dots.llm1 has none).
    """
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_RESPONSE,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (END_OF_RESPONSE, END_OF_TEXT)],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory; one that brings no chat template gets the dots layout's, as that of a
    base model has its tokens.

    Raises:
        ValueError: there is none, it is damaged, or it has neither a template nor the tokens of the dots layout.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(
            f"{directory}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json of its model into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"{directory}: its tokenizer cannot be loaded: {told}; copy tokenizer.json again") from None
    if not tokenizer.chat_template:
        known = tokenizer.get_vocab()
        if missing := [token for token in layout_tokens() if token not in known]:
            raise ValueError(
                f"{directory}: no chat template, and no token {missing[0]} of the dots layout; copy the model's "
                "chat_template.jinja into it"
            )
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

#!/usr/bin/env python
"""How fast is an evaluation? lm-evaluation-harness' requests for GSM8K, on our engine and on its own back end.

In one process, on the same tiny weights, prompts and limits, taking turns: `EngineLM` (what `dots-align eval --lm-eval`
runs) and the harness' `HFLM` for plain transformers, at the batch size that is fastest for it on the first prompts.
Both decode greedily and stop at the end of a turn, at the harness' stop texts for GSM8K, or after --max-tokens. The
harness gets a fixed batch size, as its `auto` takes the largest that fits, which is slower on a CPU.

The prompts are GSM8K's test questions (--data), else made-up ones of their length; after five examples, as the harness
asks GSM8K by default, and without any. The first 200 of them with answers of 64 tokens take some minutes on two cores,
most of them the harness' own; --full takes all 1,319, with answers of 256 tokens, as the harness has it. Give a
--checkpoint that ends its answers, as those of an evaluation do; fresh weights never end a turn.

    dots-align sft recipes/tiny/sft.yaml output_dir=runs/gsm8k/sft data.path=…/gsm8k/train.jsonl \\
        data.prompt_field=question data.response_field=answer train.max_steps=160 on_save=[]
    scripts/bench_eval.py --checkpoint runs/gsm8k/sft/last --data …
    scripts/bench_eval.py --quick

Needs `pip install -c constraints.txt -e '.[lm-eval]'`. Prints a table, then `RESULT {json}`:

    eval_ratio        with examples: seconds of the harness' back end / ours (medians)
    eval_ratio_zero_shot   the same without
    same_answers      share of answers that are equal, letter by letter, the smaller one
    runs              {examples: {ours, harness: seconds; mean_tokens of an answer; batch_size of the harness}}
    num_items, max_tokens, quick, trained
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from dots_align.checkpoint import load_model
from dots_align.config import ModelSection
from dots_align.data import synthetic
from dots_align.data.tokenizer import train_tokenizer
from dots_align.evals.lm_eval import EngineLM
from dots_align.evals.task import load_items, load_task
from dots_align.model.dots1 import create_model, preset_config

_ASKED = "Ann has some apples and sells three of them to each friend at two dollars every day how many "
NUM_SHOTS, BATCH_SIZES = 5, (8, 16, 32, 64)
STOP = ["Question:", "</s>", "<|im_end|>"]  # lm_eval/tasks/gsm8k/gsm8k.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/test.jsonl; made-up prompts if not given")
    parser.add_argument("--checkpoint", type=Path, help="fresh tiny weights if not given")
    parser.add_argument("--num-items", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="1319 prompts, 256 tokens")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="48 prompts, 32 tokens")
    options = parser.parse_args()
    count, max_tokens = options.num_items, options.max_tokens
    if options.full or options.quick:
        count, max_tokens = (1319, 256) if options.full else (48, 32)
    model, tokenizer = loaded(options.checkpoint)
    ours, plain = EngineLM(model, tokenizer), plain_copy(model)
    print(f"{count} prompts, at most {max_tokens} tokens an answer, {torch.get_num_threads()} threads")
    print(f"{'examples':>8} {'tokens/answer':>14} {'ours':>9} {'harness':>9} {'ratio':>7} {'same':>7}")
    runs = {}
    for shots in (NUM_SHOTS, 0):
        texts = [
            ours.apply_chat_template([{"role": "user", "content": text}])
            for text in prompts(options.data, count, shots)
        ]
        runs[shots] = run = compare(ours, plain, texts, max_tokens, max(options.repeats, 1))
        print(
            f"{shots:8} {run['mean_tokens']:14.1f} {run['ours']:7.1f} s {run['harness']:7.1f} s {run['ratio']:6.2f}x "
            f"{run['same']:7.1%}"
        )
    summary = {
        "eval_ratio": runs[NUM_SHOTS].pop("ratio"),
        "eval_ratio_zero_shot": runs[0].pop("ratio"),
        "same_answers": min(run.pop("same") for run in runs.values()),
        "runs": runs,
        "num_items": count,
        "max_tokens": max_tokens,
        "quick": options.quick,
        "trained": bool(options.checkpoint),
    }
    print("RESULT " + json.dumps(summary))


def compare(ours: EngineLM, plain: Any, texts: list[str], max_tokens: int, repeats: int) -> dict[str, Any]:
    """Both on the same prompts, taking turns: median seconds of each, their ratio, and how many answers are equal."""
    requests = [
        Instance("generate_until", {}, (text, {"until": STOP, "max_gen_toks": max_tokens, "do_sample": False}), n)
        for n, text in enumerate(texts)
    ]
    size = fastest(plain, ours.tokenizer, requests[: max(BATCH_SIZES)])
    theirs = HFLM(pretrained=plain, tokenizer=ours.tokenizer, batch_size=size, device="cpu")
    ours.generate_until(requests[:2])  # compiles the native forward
    seconds: dict[str, list[float]] = {"ours": [], "harness": []}
    found: dict[str, list[str]] = {}
    for _ in range(repeats):
        found = {name: timed(lm, requests, seconds[name]) for name, lm in (("ours", ours), ("harness", theirs))}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    same = sum(a == b for a, b in zip(found["ours"], found["harness"], strict=True)) / len(texts)
    return {
        **{name: round(value, 2) for name, value in medians.items()},
        "mean_tokens": round(statistics.mean(len(ours.tok_encode(text)) for text in found["ours"]), 1),
        "batch_size": size,
        "ratio": round(medians["harness"] / medians["ours"], 2),
        "same": round(same, 4),
    }


def loaded(checkpoint: Path | None) -> tuple[Any, Any]:
    """A checkpoint, or fresh tiny weights."""
    if checkpoint is not None:
        model, tokenizer = load_model(ModelSection(path=str(checkpoint)))
        return model.eval(), tokenizer
    tokenizer = train_tokenizer(synthetic.corpus(), preset_config("tiny").vocab_size, 2048)
    config = preset_config("tiny", eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return create_model(config, 0, ()).eval(), tokenizer


def prompts(data: Path | None, count: int, shots: int) -> list[str]:
    """GSM8K's test questions as the suite asks them, or made-up ones of about their length, each after the same
    answered ones.
    """
    if data is not None:
        asked = [item.prompt for item in load_items(load_task("gsm8k"), data, None, count, hub=False)]
        lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:shots]
        examples = [f"{example['question']}\n{example['answer']}\n\n" for example in map(json.loads, lines)]
        return ["".join(examples) + text for text in asked]
    rng = random.Random(0)
    words = _ASKED.split()
    examples = "".join(" ".join(rng.choices(words, k=100)) + "\n\n" for _ in range(shots))
    return [examples + " ".join(rng.choices(words, k=rng.randrange(20, 80))) for _ in range(count)]


def plain_copy(model: Any) -> Any:
    """The same weights in plain transformers, with the attention and experts it chooses itself."""
    from transformers import Dots1ForCausalLM

    config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if not k.startswith("_")})
    plain = Dots1ForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def fastest(plain: Any, tokenizer: Any, requests: list[Any]) -> int:
    """The batch size at which the harness' back end answers these soonest."""
    taken: dict[int, list[float]] = {size: [] for size in BATCH_SIZES if size <= len(requests)}
    for size, seconds in taken.items():
        timed(HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=size, device="cpu"), requests, seconds)
    return min(taken, key=lambda size: taken[size][0])


def timed(lm: Any, requests: list[Any], seconds: list[float]) -> list[str]:
    started = time.perf_counter()
    with torch.no_grad():
        found = lm.generate_until(requests, disable_tqdm=True)
    seconds.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Do our suite and lm-evaluation-harness measure the same? The same checkpoint on the same local files, both ways.

Ours: `dots-align eval`, with the rollout engine and packed forwards. Theirs: the harness with its own back end for
plain transformers, its own metrics (GSM8K's flexible-extract, multiple choice, its IFEval checks), and our prompts.
Every item that differs is shown with its reason:

    tie      the texts part (or the choices trade places) where plain transformers gives two tokens the same chance
             within 1e-3 nats: rounding decides
    metric   the same text, judged differently: both judgements are shown
    UNKNOWN  anything else; the exit status is then 1

    scripts/check_lm_eval.py runs/tiny/grpo/best --data ../shared/data

Needs `pip install -c constraints.txt -e '.[lm-eval]'`, and for IFEval langdetect, nltk (with its punkt_tab data) and
immutabledict. The last line is `RESULT {json}`: by task `ours`, `theirs`, `num_items`, `tie`, `metric`, `unknown`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer, Dots1ForCausalLM

from dots_align.checkpoint import fingerprint, load_model
from dots_align.config import ModelSection
from dots_align.evals.benchmarks import Suite, run_suite
from dots_align.evals.task import load_items, load_task, prompt_ids

TIE = 1e-3  # nats
SUBJECTS = ("elementary_mathematics", "us_foreign_policy", "high_school_geography")
NUMBER = {
    "metric_list": [
        {"metric": "exact_match", "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"], "ignore_case": True}
    ],
    "filter_list": [
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        }
    ],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc"}],
}


@dataclass(frozen=True)
class Compared:
    """How a task is put to the harness: what its configuration adds, and where its samples hold the score."""

    name: str
    config: dict[str, Any]
    score: str
    chat: bool = True


TASKS = {
    "gsm8k": Compared("gsm8k", NUMBER, "exact_match"),
    "cmath": Compared("cmath", NUMBER, "exact_match"),
    "mmlu": Compared("mmlu", CHOICE, "acc", chat=False),
    "ifeval": Compared("ifeval", {"process_results": "!function utils.process_results"}, "prompt_level_strict_acc"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/, cmath/, mmlu/ and ifeval/")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=100, help="items of each task (of MMLU, of its first subjects)")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--show", type=int, default=5, help="most items shown of each kind of difference")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.tasks.split(","):
            found[name] = compare(TASKS[name], options, Path(scratch))
    print(f"\n{'task':8} {'items':>6} {'ours':>8} {'harness':>8} {'tie':>5} {'metric':>7} {'unknown':>8}")
    for name, row in found.items():
        rates = f"{100 * row['ours']:7.2f}% {100 * row['theirs']:7.2f}%"
        print(f"{name:8} {row['num_items']:6} {rates} {row['tie']:5} {row['metric']:7} {row['unknown']:8}")
    print("RESULT " + json.dumps(found))
    sys.exit(any(row["unknown"] for row in found.values()))


def compare(task: Compared, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs a task both ways and explains what differs."""
    data = options.data if task.name != "mmlu" else _subset(options.data, scratch / "data")
    section = load_task(task.name)
    plain = Dots1ForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    ours = _ours(task, options, data, scratch)
    items = load_items(section.model_copy(update={"num_shots": 0}), data, None, options.limit, False)
    theirs = _theirs(task, items, plain, tokenizer, options, scratch)
    counts = {"tie": 0, "metric": 0, "unknown": 0}
    for item, mine, other in zip(items, ours, theirs, strict=True):
        explain = _explain_choice if item.choices else _explain_text
        ids = prompt_ids(tokenizer, section, item)
        kind, why = explain(plain, tokenizer, ids, mine, other)
        if kind:
            counts[kind] += 1
            if counts[kind] <= options.show:
                told = f"ours {mine['score']:g}, harness {other['score']:g}"
                print(
                    f"{task.name}: {Path(item.source).name}: {'UNKNOWN' if kind == 'unknown' else kind}: {told}; {why}"
                )
    mean = [sum(row["score"] for row in rows) / len(rows) for rows in (ours, theirs)]
    return {"ours": mean[0], "theirs": mean[1], "num_items": len(items), **counts}


def _subset(folder: Path, target: Path) -> Path:
    (target / "mmlu" / "test").mkdir(parents=True, exist_ok=True)
    for subject in SUBJECTS:
        name = f"{subject}_test.csv"
        (target / "mmlu" / "test" / name).write_bytes((folder / "mmlu" / "test" / name).read_bytes())
    return target


def _ours(task: Compared, options: argparse.Namespace, data: Path, scratch: Path) -> list[dict[str, Any]]:
    model, tokenizer = load_model(ModelSection(path=str(options.checkpoint)))
    changes = (("max_tokens", options.max_tokens),)
    suite = Suite((task.name,), data, options.limit, num_shots=0, changes=changes)
    result = run_suite(model, tokenizer, suite, fingerprint(options.checkpoint), scratch / "ours")[task.name]
    (path,) = (scratch / "ours").glob(f"{task.name}-*.items.jsonl")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert "error" not in record, record
        row = {"score": record["scores"][result["metric"]][0]}
        if "answers" in record:
            row["text"] = record["answers"][0]["text"]
        else:
            row["logprobs"] = [likelihood["logprob"] for likelihood in record["likelihoods"]]
        rows.append(row)
    return rows


def _theirs(
    task: Compared, items: list[Any], plain: Any, tokenizer: Any, options: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    folder = scratch / f"harness-{task.name}"
    folder.mkdir()
    rows = []
    for item in items:
        row = {"asked": item.prompt, "gold": item.gold, "reference": item.reference}
        if task.name == "ifeval":
            wanted = json.loads(item.reference)
            names = [name.removeprefix("en:") for name in wanted["instruction_id_list"]]
            row |= {
                "key": 0,
                "prompt": item.prompt,
                "instruction_id_list": names,
                "kwargs": json.dumps(wanted["kwargs"]),
            }
        rows.append(row)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    name = f"same_{task.name}"
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{asked}}",
        "doc_to_target": "{{reference}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": options.max_tokens},
        **task.config,
    }
    if task.name == "ifeval":
        (folder / "utils.py").write_text(IFEVAL)
        config["metric_list"] = [{"metric": task.score, "aggregation": "mean", "higher_is_better": True}]
    text = yaml.safe_dump(config).replace("'!function utils.process_results'", "!function utils.process_results")
    (folder / f"{name}.yaml").write_text(text)
    results: Any = simple_evaluate(
        model=HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=32, device="cpu"),
        tasks=[name],
        task_manager=TaskManager(include_path=str(folder)),
        apply_chat_template=task.chat,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    found = []
    for sample in samples:
        row: dict[str, Any] = {"score": float(sample[task.score])}
        if task.chat:
            row["text"], row["kept"] = sample["resps"][0][0], sample["filtered_resps"]
        else:
            row["logprobs"] = [float(pair[0]) for pair in sample["filtered_resps"]]
        found.append(row)
    return found


# JSON has no column of mixed objects: the parameters travel as text.
IFEVAL = """import json

from lm_eval.tasks.ifeval import utils


def process_results(doc, results):
    return {
        k: v for k, v in utils.process_results({**doc, "kwargs": json.loads(doc["kwargs"])}, results).items()
        if k == "prompt_level_strict_acc"
    }
"""


def _explain_choice(
    plain: Any, tokenizer: Any, ids: list[int], mine: dict[str, Any], other: dict[str, Any]
) -> tuple[str, str]:
    apart = max(abs(a - b) for a, b in zip(mine["logprobs"], other["logprobs"], strict=True))
    if mine["score"] == other["score"] and apart < TIE:
        return "", ""
    first, second = sorted(other["logprobs"], reverse=True)[:2]
    if first - second < TIE and apart < TIE:
        return "tie", f"the two likeliest choices are {first - second:.1e} nats apart"
    return "unknown", f"log-likelihoods {mine['logprobs']} and {other['logprobs']}"


def _explain_text(
    plain: Any, tokenizer: Any, ids: list[int], mine: dict[str, Any], other: dict[str, Any]
) -> tuple[str, str]:
    if mine["text"] == other["text"]:
        if mine["score"] == other["score"]:
            return "", ""
        return "metric", f"the harness made {other['kept']!r} of {mine['text'][-60:]!r}"
    a, b = (tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in (mine, other))
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    with torch.no_grad():
        logits = plain(torch.tensor([ids + a[:same]])).logits[0, -1].log_softmax(-1)
    first, second = logits.topk(2).values.tolist()
    told = f"the texts part at token {same}, where the two likeliest are {first - second:.1e} nats apart"
    return ("tie" if first - second < TIE else "unknown"), told


if __name__ == "__main__":
    main()

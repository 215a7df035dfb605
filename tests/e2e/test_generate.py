"""`dots-align generate`: a line per prompt, the same lines whatever happened on the way."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from dots_align import cli

QUESTIONS = [f"What is {n} plus {n + 3}?" for n in range(10, 34)]
QUICK = ("num_samples=2", "max_tokens=24", "seed=4")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": q, "answer": "1"}) + "\n" for q in QUESTIONS))
    return path


def lines(path: Path) -> dict[int, dict[str, Any]]:
    """The lines by prompt; none is torn or there twice."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    by_index = {line["index"]: line for line in found}
    assert len(by_index) == len(found)
    return by_index


def test_every_prompt_gets_its_samples(start: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "out.jsonl"
    cli.main(["generate", str(start), str(prompts), str(out), *QUICK, "logprobs=true", "routes=true"])
    assert capsys.readouterr().out == f"{out}\n"
    found = lines(out)
    assert sorted(found) == list(range(len(QUESTIONS)))
    assert len({line["hash"] for line in found.values()}) == len(QUESTIONS)
    for index, line in found.items():
        assert line["messages"] == [{"role": "user", "content": QUESTIONS[index]}]
        assert (line["source"], line["answer"]) == (f"{prompts}:{index + 1}", "1")
        assert len(line["samples"]) == 2
        for sample in line["samples"]:
            count = sample["num_tokens"]
            assert 1 <= count <= 24
            assert sample["finish_reason"] == ("length" if count == 24 else sample["finish_reason"])
            assert len(sample["response_ids"]) == len(sample["logprobs"]) == len(sample["rollout_logprobs"]) == count
            assert all(value <= 0 for value in sample["logprobs"])
            routes = base64.b64decode(sample["routes"])
            assert len(routes) == (len(line["prompt_ids"]) + count - 1) * 3 * 2  # 3 layers of experts, top 2
    texts = [s["text"] for line in found.values() for s in line["samples"]]
    assert len(set(texts)) > len(QUESTIONS)  # each prompt and sample has random numbers of its own


def test_the_batch_does_not_matter_and_greedy_samples_agree(start: Path, prompts: Path, tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide.jsonl", tmp_path / "narrow.jsonl"
    cli.main(["generate", str(start), str(prompts), str(wide), *QUICK])
    cli.main(["generate", str(start), str(prompts), str(narrow), *QUICK, "max_num_sequences=3", "kv_cache_gib=0.001"])
    assert lines(wide) == lines(narrow)
    greedy = tmp_path / "greedy.jsonl"
    cli.main(["generate", str(start), str(prompts), str(greedy), *QUICK, "temperature=0", "data.max_samples=3"])
    assert all(len({s["text"] for s in line["samples"]}) == 1 for line in lines(greedy).values())


@pytest.mark.slow
def test_killed_and_run_again_gives_the_lines_of_an_uninterrupted_run(
    spawn: Callable[..., Forked], start: Path, prompts: Path, tmp_path: Path
) -> None:
    keys = (*QUICK, "max_tokens=64", "max_num_sequences=4")
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    output, _ = (process := spawn("generate", start, prompts, whole, *keys)).communicate()
    assert process.returncode == 0, output
    process = spawn("generate", start, prompts, killed, *keys, dies_at=("samples", 7))
    assert process.wait() == -signal.SIGKILL, process.said()
    kept = killed.read_text()
    assert kept.count("\n") == 6
    with killed.open("a") as torn:
        torn.write('{"index": 23, "hash": "ab')  # what a process leaves that dies while writing
    output, _ = (process := spawn("generate", start, prompts, killed, *keys)).communicate()
    assert process.returncode == 0, output
    assert f"{kept.count(chr(10))} of 24 prompts are done already" in output
    assert killed.read_text().startswith(kept)
    assert lines(killed) == lines(whole)
    before = killed.read_text()
    output, _ = (process := spawn("generate", start, prompts, killed, *keys)).communicate()
    assert process.returncode == 0, output
    assert killed.read_text() == before


def test_another_run_is_refused_by_name(fails, start: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    few = "data.max_samples=2"
    cli.main(["generate", str(start), str(prompts), str(out), *QUICK, few])
    before = out.read_text()
    told = fails("generate", start, prompts, out, *QUICK, few, "temperature=0.5")
    assert f"{out}: it was begun with other settings (temperature: 1.0 -> 0.5)" in told
    assert "choose another file, or give overwrite=true" in told
    assert "prompts: " in fails("generate", start, prompts, out, *QUICK)
    earlier = start.parent / "checkpoint-2"
    assert "checkpoint: " in fails("generate", earlier, prompts, out, *QUICK, few)
    assert out.read_text() == before
    cli.main(["generate", str(start), str(prompts), str(out), *QUICK, few, "temperature=0", "overwrite=true"])
    assert out.read_text() != before
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("precious\n")
    told = fails("generate", start, prompts, foreign, *QUICK)
    assert f"{foreign}: not empty, and nothing that generate began" in told
    assert foreign.read_text() == "precious\n"
    assert f"{prompts}: this is the file of the prompts" in fails("generate", start, prompts, prompts)


def test_a_prompt_that_cannot_be_done_is_told_and_the_others_are_done(
    fails, start: Path, prompts: Path, tmp_path: Path
) -> None:
    with prompts.open("a") as more:
        more.write(json.dumps({"prompt": "seven " * 3000}) + "\n")
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # tried again by a second run
        told = fails("generate", start, prompts, out, *QUICK)
        assert f"{out}: 1 of 25 prompts could not be done" in told
        assert f"the first is {prompts}:25: prompt of " in told
        found = lines(out)
        assert len(found) == 25
        assert "exceeds the context of 2048 tokens" in found[24]["error"]
        assert [i for i, line in found.items() if "samples" not in line] == [24]


def test_bad_input_is_named_before_anything_is_made(fails, start: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert "nowhere.jsonl: no such file" in fails("generate", start, "nowhere.jsonl", out)
    with prompts.open("a") as more:
        more.write('{"prompt": \n')
    assert f"{prompts}:25: broken JSON" in fails("generate", start, prompts, out)
    assert "did you mean `num_samples`?" in fails("generate", start, prompts, out, "num_sample=2")
    told = fails("generate", start, prompts, out, "top_p=2")
    assert "override 'top_p=2': `top_p`: input should be less than or equal to 1" in told
    assert "no such checkpoint directory" in fails("generate", tmp_path / "no", prompts, out)
    assert "no field 'question'" in fails("generate", start, prompts, out, "data.prompt_field=question")
    assert not out.exists()


@pytest.mark.slow
def test_an_adapter_generates(recipe, start: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "lora"
    quick = ("data.max_samples=40", "train.max_steps=1", "on_save=[]")
    cli.main(["sft", recipe("sft_lora"), f"output_dir={run}", f"model.path={start}", "model.preset=null", *quick])
    out = tmp_path / "out.jsonl"
    cli.main(["generate", str(run / "last"), str(prompts), str(out), *QUICK, "data.max_samples=2"])
    assert sorted(lines(out)) == [0, 1]


@pytest.mark.slow
def test_two_processes_share_the_prompts(repo_root: Path, start: Path, prompts: Path, tmp_path: Path) -> None:
    """Same lines as one process; and what one of them wrote before all were killed is not done again."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", "DOTS_ALIGN_DEVICE": "cpu"}

    def launch(out: Path, *keys: str) -> str:
        done = subprocess.run(
            [*torchrun, "dots_align", "generate", str(start), str(prompts), str(out), *QUICK, *keys, "parallel.ep=2"],
            cwd=repo_root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    for seed in ("seed=4", "seed=5", "seed=6"):  # another one where experts tie, so that rounding decides
        one, two = tmp_path / f"one-{seed}.jsonl", tmp_path / f"two-{seed}.jsonl"
        cli.main(["generate", str(start), str(prompts), str(one), *QUICK, seed])
        launch(two, seed)
        if lines(two) == lines(one):
            break
    assert lines(two) == lines(one)
    assert sorted(p.name for p in tmp_path.glob(f"{two.name}*")) == [two.name, f"{two.name}.run.json"]
    texts = two.read_text().splitlines(keepends=True)
    two.write_text("".join(texts[:6]))
    two.with_name(f"{two.name}.part-1").write_text("".join(texts[6:9]) + texts[9][:20])
    assert "9 of 24 prompts are done already" in launch(two, seed)
    assert lines(two) == lines(one)

"""The stages through the real command line, a few steps each: what they write, and what the figures in it promise."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from dots_align import cli
from dots_align.checkpoint import check_whole
from dots_align.report.page import write_report
from tests.e2e.conftest import QUICK_GRPO, QUICK_SFT

Recipe = Callable[[str], str]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_sft_leaves_whole_evaluated_linked_checkpoints(start: Path):
    run_dir = start.parent
    assert [p.name for p in sorted(run_dir.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-3"]
    assert os.readlink(start) == "checkpoint-3"
    assert (run_dir / "best").is_symlink()
    assert not list(run_dir.glob(".*"))
    for checkpoint in run_dir.glob("checkpoint-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["stage"] == "sft"
        assert manifest["step"] == int(checkpoint.name.split("-")[1])
        assert manifest["recipe"]["train"]["max_steps"] == 3
        assert len(manifest["data_hash"]) == 64
        files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
        assert files - set(manifest["files"]) == {"manifest.json", "eval.json"}
        evaluation = json.loads((checkpoint / "eval.json").read_text())
        assert set(evaluation["metrics"]) == {"exact_match", "stop_rate", "mean_length"}
    losses = [line["sft/loss"] for line in metrics(run_dir) if "sft/loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    with safe_open(start / "model.safetensors", "pt") as weights:
        assert "model.layers.1.mlp.experts.0.gate_proj.weight" in weights.keys()  # noqa: SIM118 - not a dict
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in weights.keys()  # noqa: SIM118


def test_grpo_logs_the_agreement_of_trainer_and_rollout_at_every_step(
    recipe: Recipe, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cli.main(
        [
            "grpo",
            recipe("grpo"),
            f"output_dir={tmp_path / 'grpo'}",
            f"model.path={start}",
            *QUICK_GRPO,
            "train.max_steps=3",
            "rewards.0.function=reward_models.length:brevity",
            f"rewards.1.function={_odd_reward(tmp_path)}:odd",
        ]
    )
    assert capsys.readouterr().out == f"{tmp_path / 'grpo' / 'checkpoint-3'}\n"
    lines = [line for line in metrics(tmp_path / "grpo") if "grpo/reward" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grpo/agreement_median"] < 1e-5
        assert line["grpo/agreement_max"] < 1e-3
        assert line["grpo/agreement_flips"] >= 0
        assert line["grpo/reward"] == pytest.approx(line["grpo/reward_brevity"] + line["grpo/reward_odd"])
    routers = [json.loads(line) for line in (tmp_path / "grpo" / "router.jsonl").read_text().splitlines()]
    assert routers[0]["layers"] == [1, 2, 3]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in routers[0]["load"])
    samples = [json.loads(line) for line in (tmp_path / "grpo" / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "response", "answer", "reward", "rewards", "finish_reason"} < set(samples[0])
    for sample in samples:
        if "\ufffd" not in sample["response"]:
            assert re.sub(r"<\|\w+\|>", "", "".join(sample["tokens"])) == sample["response"]
        assert len(sample["logprobs"]) == len(sample["tokens"])
        assert all(value <= 0 for value in sample["logprobs"])
        assert len(sample["advantages"]) == 1  # GRPO's are the same for all tokens
    assert any(sample["advantages"] != [0.0] for sample in samples)


def _odd_reward(folder: Path) -> Path:
    """A reward with variance, which an untrained model's wrong answers do not have."""
    path = folder / "odd_reward.py"
    path.write_text("def odd(response):\n    return float(sum(response.response_ids) % 2)\n")
    return path


def test_grpo_with_a_kl_term_and_several_updates(recipe: Recipe, start: Path, tmp_path: Path):
    cli.main(
        [
            "grpo",
            recipe("grpo"),
            f"output_dir={tmp_path / 'grpo'}",
            f"model.path={start}",
            *QUICK_GRPO,
            "on_save=[]",
            "algorithm.kl_coef=0.1",
            "train.num_epochs=2",
            "train.num_minibatches=2",
            f"rewards.0.function={_odd_reward(tmp_path)}:odd",
            "trackers=[tensorboard]",
        ]
    )
    first, second = metrics(tmp_path / "grpo")
    assert first["grpo/kl"] >= 0
    assert second["grpo/kl"] > 0
    assert list((tmp_path / "grpo" / "tensorboard").iterdir())


def test_grpo_with_a_tool_learns_from_the_models_own_tokens(
    recipe: Recipe, start: Path, tmp_path: Path, repo_root: Path
):
    cli.main(
        [
            "grpo",
            recipe("grpo_calculator"),
            f"output_dir={tmp_path / 'grpo'}",
            f"model.path={start}",
            f"environment.factory={repo_root / 'recipes' / 'tiny' / 'calculator.py'}:Calculator",
            "environment.arguments={reward: 0.25}",
            f"rewards.1.function={_odd_reward(tmp_path)}:odd",
            "data.max_samples=16",
            "train.max_steps=2",
            "train.num_prompts_per_step=8",
            "train.num_minibatches=1",
            "rollout.group_size=4",
            "rollout.max_tokens=200",
            "train.off_policy_steps=1",
            "rollout_correction.rollout_is=token",
            "router.replay=R3",
            "save.save_steps=1",
        ]
    )
    lines = metrics(tmp_path / "grpo")
    assert all(1 < line["grpo/turns"] <= 2 for line in lines)
    assert all(line["grpo/environment_errors"] == 0 for line in lines)
    assert all(line["grpo/mismatch_mean"] < 0.05 and line["grpo/agreement_flips"] >= 0 for line in lines)
    assert all(line["grpo/grad_norm"] > 0 for line in lines)
    assert lines[0]["grpo/agreement_median"] < 1e-5
    assert lines[0]["grpo/reward"] == pytest.approx(
        sum(lines[0][f"grpo/reward_{name}"] for name in ("boxed_answer", "odd", "environment"))
    )
    samples = [json.loads(line) for line in (tmp_path / "grpo" / "samples.jsonl").read_text().splitlines()]
    talked = [s for s in samples if "<|endofresponse|>" in s["tokens"][:-1]]
    assert talked
    for sample in talked:
        tokens, taught = sample["tokens"], sample["advantages"]
        asked = tokens.index("<|endofresponse|>") + 1
        answered = tokens.index("<|response|>", asked)
        said = re.fullmatch(r"<\|userprompt\|>(.*)<\|endofuserprompt\|>", "".join(tokens[asked:answered]))
        assert said
        assert said[1] == "?" or re.fullmatch(r"\d+[+-]\d+=-?\d+", said[1])
        assert set(sample["logprobs"][asked : answered + 1]) == {0.0}
        assert 0.0 not in sample["logprobs"][:asked]
        assert taught == [0.0] or set(taught[asked : answered + 1]) == {0.0} != set(taught)
    assert any(len(sample["advantages"]) > 1 for sample in talked)
    kept = (tmp_path / "grpo" / "checkpoint-1" / "rollouts.jsonl").read_text().splitlines()
    assert any(0 in (json.loads(line).get("response_mask") or []) for line in kept)


def test_ppo_trains_a_critic_and_keeps_it_beside_the_policy(recipe: Recipe, start: Path, tmp_path: Path):
    run_dir = tmp_path / "ppo"
    cli.main(
        [
            "ppo",
            recipe("ppo"),
            f"output_dir={run_dir}",
            f"model.path={start}",
            *QUICK_GRPO,
            "on_save=[]",
            "critic.warmup_steps=1",
            "algorithm.kl_coef=0.1",
            f"rewards.0.function={_odd_reward(tmp_path)}:odd",
        ]
    )
    first, second = metrics(run_dir)
    assert "ppo/loss" not in first
    assert second["ppo/mismatch_kl"] < 1e-4  # where two experts tie, trainer and rollout may choose differently
    assert first["ppo/value_loss"] > 0
    assert first["ppo/kl"] == pytest.approx(0, abs=1e-6)
    manifest = json.loads((run_dir / "last" / "manifest.json").read_text())
    assert {"critic/model.safetensors", "critic/config.json", "critic/optimizer_state.json"} <= set(manifest["files"])
    assert not [name for name in manifest["files"] if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    again = tmp_path / "again"
    path = f"critic.path={run_dir / 'last' / 'critic'}"
    keys = [f"model.path={start}", *QUICK_GRPO, "on_save=[]", "critic.warmup_steps=0", path, "train.max_steps=1"]
    cli.main(["ppo", recipe("ppo"), f"output_dir={again}", *keys, f"rewards.0.function={_odd_reward(tmp_path)}:odd"])
    assert metrics(again)[0]["ppo/value"] != 0


def test_a_mismatch_gate_ends_a_run_with_the_evidence(recipe: Recipe, start: Path, tmp_path: Path, fails):
    keys = [f"model.path={start}", *QUICK_GRPO, "mismatch.stop_above=1.0e-30", "mismatch.measure=max"]
    reward = f"rewards.0.function={_odd_reward(tmp_path)}:odd"
    message = fails("grpo", recipe("grpo"), f"output_dir={tmp_path / 'grpo'}", *keys, reward)
    assert "step 1: the trainer's log-probs do not agree" in message
    assert not (tmp_path / "grpo" / "last").exists()


def test_lora_trains_and_saves_only_adapters_and_the_next_stage_takes_them(
    recipe: Recipe, start: Path, tmp_path: Path, fails
):
    own = [f"model.path={start}", "data.max_samples=40", "evaluation.num_prompts=8"]
    cli.main(["sft", recipe("sft_lora"), f"output_dir={tmp_path / 'sft'}", *own, "train.max_steps=2"])
    adapter = tmp_path / "sft" / "last"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
    assert names
    assert all("lora_" in name for name in names)
    assert not (adapter / "model.safetensors").exists()
    assert (adapter / "eval.json").is_file()
    dpo = [
        f"model.path={adapter}",
        "data.max_samples=8",
        "train.per_device_train_batch_size=4",
        "evaluation.num_prompts=8",
    ]
    cli.main(["dpo", recipe("dpo_lora"), f"output_dir={tmp_path / 'dpo'}", *dpo])
    assert [line["step"] for line in metrics(tmp_path / "dpo") if "dpo/loss" in line] == [1, 2]
    message = fails("sft", recipe("sft_lora"), f"output_dir={tmp_path / 'bad'}", *own, "lora.target_modules=[q_prj]")
    assert "'q_prj' matches no linear layer; there are" in message


def test_dpo_reads_reference_logprobs_from_the_runs_own_cache(recipe: Recipe, start: Path, tmp_path: Path, monkeypatch):
    from trl import DPOTrainer

    command = [
        "dpo",
        recipe("dpo"),
        f"output_dir={tmp_path}/dpo",
        f"model.path={start}",
        "data.max_samples=8",
        "on_save=[]",
        "train.per_device_train_batch_size=4",
        "save.save_steps=1",
    ]
    cli.main(command)
    assert list((tmp_path / "dpo" / "preference_pairs").rglob("cache-*.arrow"))
    shutil.rmtree(tmp_path / "dpo" / "checkpoint-2")

    def computed_again(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the reference log-probs were computed a second time")

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", computed_again)
    cli.main(command)
    assert (tmp_path / "dpo" / "checkpoint-2" / "model.safetensors").is_file()


HOOKS = """
import os, signal, time

def boom(checkpoint, recipe):
    raise RuntimeError("disk on fire")

def hang(checkpoint, recipe):
    time.sleep(600)

def killed(checkpoint, recipe):
    os.kill(os.getpid(), signal.SIGKILL)
"""
FAILED = {"boom": "failed", "hang": "timed_out", "killed": "killed"}


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model", "grpo", "ppo"])
def test_hooks_that_raise_hang_or_are_killed_cost_nothing(recipe: Recipe, start: Path, tmp_path: Path, stage: str):
    """Beside each other in one run: the others are done, the run ends, the checkpoint is whole, the report tells."""
    file, run_dir = tmp_path / "hooks.py", tmp_path / stage
    file.write_text(HOOKS)
    failing = f"'{file}:boom', {{hook: '{file}:hang', timeout_seconds: 1.5}}, '{file}:killed'"
    beside = ", {hook: evaluate, in: process}" if stage == "sft" else ""
    keys = QUICK_GRPO
    if stage in ("sft", "dpo", "reward_model"):
        keys = ("data.max_samples=8", "train.max_steps=1", "train.per_device_train_batch_size=4")
        keys += ("evaluation.num_pairs=4",) if stage == "reward_model" else QUICK_GRPO[-2:]
    more = [f"model.path={start}", "model.preset=null", f"on_save=[{failing}, evaluate{beside}]"]
    if stage == "ppo":
        more.append("critic.warmup_steps=0")
    cli.main([stage, recipe(stage), f"output_dir={run_dir}", *keys, *more])
    check_whole(run_dir / "last")
    told = [json.loads(line) for line in (run_dir / "hooks.jsonl").read_text().splitlines()]
    found = {line["hook"]: line for line in told}
    assert {name: line["status"] for name, line in found.items() if name in FAILED} == FAILED
    logged = set().union(*metrics(run_dir))
    assert {f"on_save/{name}_failed" for name in FAILED} <= logged
    assert found["evaluate"]["status"] == "done"
    assert (run_dir / "last" / "eval.json").is_file()
    if beside:
        assert found["evaluate_5"]["metrics"] == found["evaluate"]["metrics"]
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "on_save hook boom failed on checkpoint-" in page
    assert "disk on fire" in page


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_that_no_longer_improves_ends_early_and_stays_ended(
    recipe: Recipe, start: Path, tmp_path: Path, stage: str
):
    file, run_dir = tmp_path / "hooks.py", tmp_path / stage
    file.write_text("def falls(checkpoint, recipe):\n    return {'eval/x': -float(checkpoint.name.split('-')[1])}\n")
    hooks = f"{{hook: '{file}:falls', in: trainer}}, {{hook: stop_early, metric: eval/x, patience: 2}}"
    best = "{hook: keep_best, metric: eval/x}"
    keys = (*QUICK_GRPO, "train.max_steps=9") if stage == "grpo" else ("data.max_samples=99", "train.max_steps=9")
    more = [
        f"model.path={start}",
        "model.preset=null",
        f"on_save=[{hooks}, {best}]",
        "save.save_steps=1",
        "save.save_total_limit=2",
    ]
    for _ in range(2):
        cli.main([stage, recipe(stage), f"output_dir={run_dir}", *keys, *more])
        kept = ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        assert sorted(p.name for p in run_dir.glob("checkpoint-*")) == kept
        assert os.readlink(run_dir / "best") == "checkpoint-1"


def test_own_data_gsm8k(recipe: Recipe, shared_data: Path, tmp_path: Path):
    train, test = (shared_data / "gsm8k" / f"{split}.jsonl" for split in ("train", "test"))
    if not train.is_file():
        pytest.skip(f"no {train}")
    fields = [f"data.path={train}", "data.prompt_field=question"]
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    quick_sft = [k for k in QUICK_SFT if "max_samples" not in k]
    cli.main(["sft", recipe("sft"), f"output_dir={sft}", *fields, "data.response_field=answer", *quick_sft])
    held_out = [
        f"evaluation.data.path={test}",
        "evaluation.data.prompt_field=question",
        "evaluation.scorer=reward_models.math:numeric_answer",
    ]
    quick_grpo = [k for k in QUICK_GRPO if "max_samples" not in k]
    cli.main(
        [
            "grpo",
            recipe("grpo"),
            f"output_dir={grpo}",
            f"model.path={sft}/last",
            *fields,
            "data.answer_field=answer",
            "rewards.0.function=reward_models.math:numeric_answer",
            *held_out,
            *quick_grpo,
        ]
    )
    assert {"grpo/reward", "eval/exact_match"} <= set().union(*metrics(grpo))
    result = tmp_path / "gsm8k.json"
    cli.main(
        [
            "eval",
            recipe("eval"),
            f"model.path={grpo}/last",
            *held_out,
            "evaluation.max_tokens=16",
            "evaluation.num_prompts=12",
            f"output={result}",
        ]
    )
    evaluation = json.loads(result.read_text())
    assert evaluation["num_prompts"] == 12
    assert 0 <= evaluation["metrics"]["exact_match"] <= 1

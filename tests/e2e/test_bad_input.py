"""Bad input: one clear line that names the file, line or key and what to do; nothing half-written is left."""

import json
import shutil
from pathlib import Path

import pytest

from dots_align import cli
from tests.e2e.conftest import QUICK_GRPO

GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def is_one_line(message: str) -> bool:
    return "\n" not in message and "Traceback" not in message


def test_missing_data_file(fails, recipe, out: Path):
    message = fails("sft", recipe("sft"), f"output_dir={out}", "data.path=nowhere.jsonl")
    assert "nowhere.jsonl: no such file" in message
    assert is_one_line(message)
    assert not out.exists()


def test_broken_json_names_file_and_line(fails, recipe, out: Path, tmp_path: Path):
    data = jsonl(tmp_path / "data.jsonl", GOOD, '{"messages": [', GOOD)
    message = fails("sft", recipe("sft"), f"output_dir={out}", f"data.path={data}")
    assert f"{data}:2: broken JSON" in message
    assert is_one_line(message)
    assert not out.exists()


def test_empty_data_set(fails, recipe, out: Path, tmp_path: Path):
    data = jsonl(tmp_path / "data.jsonl", "", "   ")
    message = fails("sft", recipe("sft"), f"output_dir={out}", f"data.path={data}")
    assert f"{data}: the data set is empty" in message
    assert not out.exists()


def test_message_without_role(fails, recipe, out: Path, tmp_path: Path):
    data = jsonl(tmp_path / "data.jsonl", GOOD, {"messages": [{"content": "hi"}]})
    message = fails("sft", recipe("sft"), f"output_dir={out}", f"data.path={data}")
    assert f"{data}:2: messages[0] has no `role`" in message
    assert is_one_line(message)
    assert not out.exists()


def test_unknown_recipe_key_names_line_and_nearest_key(fails, recipe, out: Path, tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(Path(recipe("sft")).read_text().replace("learning_rate:", "learning_rat:"))
    line = next(i for i, text in enumerate(bad.read_text().splitlines(), 1) if "learning_rat:" in text)
    message = fails("sft", bad, f"output_dir={out}")
    assert f"{bad}:{line}: unknown key `optim.learning_rat`; did you mean `optim.learning_rate`?" in message
    assert is_one_line(message)
    assert not out.exists()


def test_wrong_type(fails, recipe, out: Path):
    message = fails("sft", recipe("sft"), f"output_dir={out}", "train.max_steps=soon")
    assert "override 'train.max_steps=soon': `train.max_steps`: input should be a valid integer" in message
    assert "'soon'" in message
    assert not out.exists()


def without_weights(start: Path, tmp_path: Path) -> Path:
    """A checkpoint that passes for whole until its weights are read."""
    copied = Path(shutil.copytree(start, tmp_path / "start"))
    weights = copied / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    return copied


@pytest.mark.parametrize("stage", ["sft", "dpo", "rft", "grpo", "eval"])
def test_missing_evaluation_data_is_said_before_weights_are_read(
    fails, recipe, start: Path, out: Path, tmp_path: Path, stage: str
):
    overrides = [f"model.path={without_weights(start, tmp_path)}", "evaluation.data.path=nowhere.jsonl"]
    overrides += [] if stage == "eval" else [f"output_dir={out}"]
    overrides += ["model.preset=null"] if stage == "sft" else []
    assert "evaluation.data.path=nowhere.jsonl: no such file" in fails(stage, recipe(stage), *overrides)


@pytest.mark.parametrize("stage", ["sft", "grpo", "ppo", "rft"])
def test_prompt_longer_than_the_context(fails, recipe, start: Path, out: Path, tmp_path: Path, stage: str):
    """Where a model samples, weights are not even looked at by then."""
    if stage != "sft":
        start = without_weights(start, tmp_path)
    long = "seven " * 3000
    data = jsonl(
        tmp_path / "data.jsonl",
        {"prompt": "short", "response": "x", "answer": "1"},
        {"prompt": long, "response": "x", "answer": "1"},
    )
    overrides = [f"output_dir={out}", f"data.path={data}", f"model.path={start}", "model.preset=null"]
    message = fails(stage, recipe(stage), *overrides)
    assert f"{data}:2: " in message
    assert "longer than" in message
    assert is_one_line(message)
    assert not list(out.glob("checkpoint-*"))


def test_checkpoint_with_a_missing_shard(fails, recipe, start: Path, out: Path, tmp_path: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(start, damaged)
    (damaged / "model.safetensors").unlink()
    message = fails("dpo", recipe("dpo"), f"output_dir={out}", f"model.path={damaged}")
    assert "model.safetensors is missing" in message
    assert str(damaged) in message
    assert is_one_line(message)
    assert not list(out.glob("checkpoint-*"))


def test_sharded_checkpoint_with_a_missing_shard_names_the_shard(fails, recipe, start: Path, tmp_path: Path):
    from dots_align.export.hf import export_hf

    sharded = export_hf(start.resolve(), tmp_path / "sharded", max_shard_bytes=4_000_000)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    message = fails("eval", recipe("eval"), f"model.path={sharded}")
    assert shards[1].name in message
    assert is_one_line(message)


@pytest.mark.parametrize("targets", [["gguf:Q3"], ["hf", "gguf"]])
def test_unknown_export_target(fails, start: Path, tmp_path: Path, targets: list[str]):
    message = fails("export", start, "--output", tmp_path / "out", "--to", *targets)
    assert f"unknown target {targets[-1]!r}; choose from hf, gguf:F32" in message
    assert is_one_line(message)
    assert not list(tmp_path.iterdir())


def test_reward_function_that_raises_is_logged_and_counted_and_the_run_goes_on(
    recipe, start: Path, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    reward = tmp_path / "my_reward.py"
    reward.write_text(
        "def fragile(response):\n"
        "    if len(response.response_ids) % 2:\n"
        "        raise KeyError('units')\n"
        "    return 1.0\n"
    )
    cli.main(
        [
            "grpo",
            recipe("grpo"),
            f"output_dir={out}",
            f"model.path={start}",
            *QUICK_GRPO,
            f"rewards.0.function={reward}:fragile",
            "rollout.max_tokens=11",
            "on_save=[]",
        ]
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert sum(line["grpo/reward_errors"] for line in lines) > 0
    assert (out / "checkpoint-2" / "model.safetensors").is_file()


def test_output_directory_of_another_run_is_refused_unless_told(fails, recipe, start: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(start.resolve().parent, run_dir, symlinks=True)
    before = sorted(p.name for p in run_dir.rglob("*"))
    message = fails("sft", recipe("sft"), f"output_dir={run_dir}", "data.max_samples=64")
    assert f"output_dir={run_dir}: it holds another run" in message
    assert "overwrite=true" in message
    assert is_one_line(message)
    assert sorted(p.name for p in run_dir.rglob("*")) == before
    told = [f"output_dir={run_dir}", "data.max_samples=64", "train.max_steps=1", "on_save=[]", "overwrite=true"]
    cli.main(["sft", recipe("sft"), *told])
    assert [p.name for p in run_dir.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_directory_that_is_no_run_is_never_deleted(fails, recipe, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = fails("sft", recipe("sft"), f"output_dir={tmp_path}", "overwrite=true")
    assert "holds no run" in message
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_reward_that_does_not_exist_is_refused_before_anything_is_written(fails, recipe, start: Path, out: Path):
    message = fails(
        "grpo", recipe("grpo"), f"output_dir={out}", f"model.path={start}", "rewards.0.function=reward_models.math:boxd"
    )
    assert "reward_models.math has no function 'boxd'" in message
    assert not out.exists()


def test_ctrl_c_says_how_to_go_on(recipe, start: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reward = tmp_path / "my_reward.py"
    reward.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["grpo", recipe("grpo"), f"output_dir={out}", f"model.path={start}", f"rewards.0.function={reward}:f"])
    assert stopped.value.code == 130
    assert "dots-align grpo: stopped; the same command goes on" in capsys.readouterr().err


def test_what_verl_cannot_run_is_refused_before_anything_is_made(fails, recipe, out: Path, start: Path):
    arguments = (
        "grpo",
        recipe("grpo"),
        f"output_dir={out}",
        f"model.path={start}",
        "launch.backend=verl",
        "on_save=[]",
    )
    message = fails(*arguments, "launch.processes_per_node=2", "router.replay=R3")
    assert "launch.backend=verl: router" in message
    message = fails(*arguments, "launch.processes_per_node=2", "data.path=nowhere.jsonl")
    assert "nowhere.jsonl: no such file" in message
    assert is_one_line(message)
    assert not out.exists()

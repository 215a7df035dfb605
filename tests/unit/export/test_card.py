"""The model card: what it says of a chain of stages, and that it is well-formed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from transformers import Dots1Config

from dots_align.export.card import model_card
from dots_align.export.curves import draw
from dots_align.export.source import History, TrainedStage, training_history, without_local_paths
from dots_align.model.dots1 import preset_config


def write_checkpoint(directory: Path, stage: str, step: int, recipe: dict) -> Path:
    directory.mkdir(parents=True)
    content = {"format": 1, "stage": stage, "step": step, "recipe": recipe, "files": {}}
    (directory / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three stages from a downloaded base, the last one's checkpoint named through a link."""
    runs = tmp_path / "runs"
    base = tmp_path / "models" / "dots.llm1.base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}", encoding="utf-8")
    sft = write_checkpoint(runs / "sft" / "checkpoint-5", "sft", 5, {"model": {"path": str(base)}})
    (runs / "sft" / "last").symlink_to(sft.name)
    dpo_recipe = {"model": {"path": str(runs / "sft" / "last")}, "beta": 0.2, "loss_type": ["sigmoid", "sft"]}
    dpo = write_checkpoint(runs / "dpo" / "checkpoint-7", "dpo", 7, dpo_recipe)
    evaluation = {"metrics": {"exact_match": 0.5}, "num_prompts": 10, "data": "/data/held|out.jsonl", "samples": []}
    (dpo / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    rewards = [{"function": "/home/me/rewards.py:exact", "weight": 0.5}]
    grpo = {"model": {"path": str(dpo)}, "rewards": rewards, "algorithm": {"kl_coef": None}}
    return write_checkpoint(runs / "grpo" / "checkpoint-9", "grpo", 9, grpo)


def card(history: History, config: Dots1Config | None = None) -> str:
    return model_card(config or preset_config("tiny"), (3_100_000, 990_000), history)


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_history_is_followed_to_the_base(chain: Path) -> None:
    history = training_history(chain)
    assert [(s.stage, s.step) for s in history.stages] == [("sft", 5), ("dpo", 7), ("grpo", 9)]
    assert history.base == "dots.llm1.base"
    assert [s.evaluation is not None for s in history.stages] == [False, True, False]


def test_history_survives_a_move_of_all_runs(chain: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "models")
    history = training_history(tmp_path / "elsewhere" / "grpo" / "checkpoint-9")
    assert [s.stage for s in history.stages] == ["sft", "dpo", "grpo"]
    assert history.base == "dots.llm1.base"


def test_history_with_a_gap_or_a_circle_ends(chain: Path) -> None:
    shutil.rmtree(chain.parents[1] / "dpo")
    history = training_history(chain)
    assert ([s.stage for s in history.stages], history.base) == (["grpo"], "checkpoint-7")
    recipe = {"model": {"path": str(chain.parent / "loop")}}
    circle = write_checkpoint(chain.parents[1] / "x" / "checkpoint-1", "sft", 1, recipe)
    (chain.parent / "loop").symlink_to(circle)
    assert [s.stage for s in training_history(circle).stages] == ["sft"]


def test_fresh_weights_are_said_to_be(tmp_path: Path) -> None:
    init = write_checkpoint(tmp_path / "sft" / "init", "init", 0, {"model": {"preset": "tiny"}})
    assert training_history(init) == History([], "preset:tiny")
    text = card(training_history(init))
    assert "fresh weights (preset `tiny`), as they are" in text
    assert "base_model" not in front_matter(text)


def test_card_has_front_matter_stages_and_evaluation(chain: Path) -> None:
    text = card(training_history(chain))
    fields = front_matter(text)
    assert fields["license"] == "mit"
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "text-generation"
    assert fields["language"] == ["zh", "en"]
    assert fields["base_model"] == "rednote-hilab/dots.llm1.base"
    assert {"dots1", "sft", "dpo", "grpo"} <= set(fields["tags"])
    assert "`dots.llm1.base` → sft → dpo → grpo" in text
    assert "| `beta` | 0.2 |" in text
    assert "| `loss_type` | sigmoid, sft |" in text
    assert "| `rewards` | rewards.py:exact × 0.5 |" in text
    assert "kl_coef" not in text
    assert "| dpo, step 7 | 0.5 | 10 | held\\|out.jsonl |" in text
    assert "exported checkpoint itself was not evaluated" in text
    assert "/home" not in text
    assert str(chain.parents[2]) not in text


def test_only_small_models_are_called_demonstrations() -> None:
    history = History([], None)
    assert "demonstration" in card(history)
    large = model_card(preset_config("llm1"), (142_800_000_000, 14_000_000_000), history)
    assert "demonstration" not in large
    assert "142.8 B in all, 14.0 B active" in large
    assert "Not evaluated." in card(history)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"metrics": 3}', '{"metrics": {"exact_match": "high"}}'])
def test_broken_evaluation_is_left_out(chain: Path, content: str) -> None:
    (chain / "eval.json").write_text(content, encoding="utf-8")
    assert training_history(chain).stages[-1].evaluation is None


def test_local_paths_are_cut_and_names_kept() -> None:
    before = {
        "a": "/home/me/data.jsonl",
        "b": ["~/x/y", "C:\\Users\\me\\z.jsonl", "../up/w", "file:///t/u", "/home/me/r.py:fn"],
        "c": {"system_prompt": "/think", "d": "runs/tiny/sft", "e": "synthetic:sft", "f": 1, "g": None},
    }
    assert without_local_paths(before) == {
        "a": "data.jsonl",
        "b": ["y", "z.jsonl", "w", "u", "r.py:fn"],
        "c": {"system_prompt": "/think", "d": "runs/tiny/sft", "e": "synthetic:sft", "f": 1, "g": None},
    }


def test_history_of_an_export_is_kept(tmp_path: Path) -> None:
    stage = TrainedStage("sft", 3, {"seed": 1}, None)
    content = {"stage": "export", "training": History([stage], "preset:tiny").as_dict()}
    (tmp_path / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    assert training_history(tmp_path) == History([stage], "preset:tiny")


def test_card_shows_curves_and_what_identifies_each_stage(chain: Path, tmp_path: Path) -> None:
    lines = [{"step": n, "grpo/reward": n / 400, "grpo/loss": float("nan"), "other": 1} for n in range(1, 400)]
    text = "\n".join(map(json.dumps, lines)) + "\n[3]\n{broken"
    (chain.parent / "metrics.jsonl").write_text(text, encoding="utf-8")
    manifest = json.loads((chain / "manifest.json").read_text(encoding="utf-8"))
    named = {"data_hash": "d4", "recipe_hash": "r5", "version": "1.2", "step": 300}
    (chain / "manifest.json").write_text(json.dumps({**manifest, **named}), encoding="utf-8")
    history = training_history(chain)
    curves = history.stages[-1].curves
    assert list(curves) == ["grpo/reward"]
    assert curves["grpo/reward"][-1] == [300, 0.75]
    assert len(curves["grpo/reward"]) == 100
    drawing = draw([(s.stage, s.curves) for s in history.stages])
    assert drawing is not None
    title = ElementTree.fromstring(drawing).findall(".//{*}text")[0].text
    assert title == "3. grpo: grpo/reward"
    text = card(history)
    assert "Made from data `d4`, recipe `r5`, dots_align `1.2`." in text
    assert text.count("](training.svg)") == 1
    again = History([TrainedStage(**s) for s in json.loads(json.dumps(history.as_dict()))["stages"]], history.base)
    assert again == history


def test_card_without_curves_shows_no_picture(chain: Path) -> None:
    history = training_history(chain)
    assert "training.svg" not in card(history)
    assert draw([(s.stage, s.curves) for s in history.stages]) is None

"""Reward models: what TRL's trainer gets to see, what lies on disk, and who can read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.dots1.modeling_dots1 import Dots1PreTrainedModel
from trl import RewardConfig, RewardTrainer

from dots_align.checkpoint import load_model, load_state, load_trainable, save_model, seal
from dots_align.config import LoraSection, ModelSection, ParallelSection
from dots_align.data.chat import encode_conversation
from dots_align.data.synthetic import preference_pairs
from dots_align.evals.preference import load_preference_model
from dots_align.model.dots1 import lm_head
from dots_align.stages.critic import load_critic
from dots_align.stages.losses import LeanRewardTrainer, LeanScorer
from dots_align.stages.reward_model import encode_pairs
from dots_align.types import Message, PreferencePair, Prompt, Response

LORA = LoraSection(
    r=2,
    lora_alpha=4,
    target_modules=("q_proj", "o_proj", "shared_experts.down_proj"),
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)


class Dots1ForSequenceClassification(GenericForSequenceClassification, Dots1PreTrainedModel):
    """What transformers has for other models and not for dots1."""


def make(model_dir: Path, lora: LoraSection | None = None) -> Any:
    """A reward model whose head, and adapters, are not zero."""
    model = load_trainable(ModelSection(path=str(model_dir)), None, False, lora, scalar_head=True)[0]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lm_head" in name or "lora_B" in name):
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def publish(model: Any, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    directory.mkdir()
    save_model(model, tokenizer, directory)
    seal(directory, {"stage": "reward_model", "step": 1})
    return directory


def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    mask = torch.tensor([[int(i < len(s)) for i in range(longest)] for s in sequences])
    return torch.tensor([s + [7] * (longest - len(s)) for s in sequences]), mask


def hidden_scores(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """By the definition: the head's product with the final hidden state of the last token, one sequence at a time."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        last = [base.model(torch.tensor([s]), use_cache=False).last_hidden_state[0, -1] for s in sequences]
    return torch.stack(last) @ lm_head(base).weight[0].detach()


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_trl_sees_the_score_of_each_padded_sequence(model_dir: Path, token_ids, attention: str) -> None:
    model = make(model_dir)
    model.config._attn_implementation = {"packed": model.config._attn_implementation}.get(attention, attention)
    sequences = token_ids(9, 30, 4, 17)
    input_ids, mask = padded(sequences)
    with torch.no_grad():
        found = LeanScorer(model)(input_ids=input_ids, attention_mask=mask).logits
    torch.testing.assert_close(found, hidden_scores(model, sequences)[:, None], atol=1e-5, rtol=1e-5)


def test_training_equals_trls_own_on_a_plain_transformers_model(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ours = make(model_dir)
    plain = Dots1ForSequenceClassification.from_pretrained(publish(ours, tokenizer, tmp_path / "rm"))
    rows = encode_pairs(tokenizer, preference_pairs(4, 0), 256)
    losses = []
    for trainer_class, model in ((LeanRewardTrainer, ours), (RewardTrainer, plain)):
        arguments = RewardConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            adam_epsilon=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model=model, args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
        )
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][1]
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        other = theirs[{"lm_head.weight": "score.weight"}.get(name, name)]
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4)


def test_a_full_checkpoint_loads_in_plain_transformers(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, token_ids, tmp_path: Path
) -> None:
    model = make(model_dir)
    directory = publish(model, tokenizer, tmp_path / "rm")
    with safe_open(directory / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in names
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Dots1ForSequenceClassification"]
    sequences = token_ids(9, 30)
    wanted = hidden_scores(model, sequences)
    plain, info = Dots1ForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    backbone = AutoModel.from_pretrained(directory)
    for sequence, score in zip(sequences, wanted, strict=True):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits[0, 0], score, atol=1e-4, rtol=1e-4)
            hidden = backbone(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden @ plain.score.weight[0].detach(), score, atol=1e-4, rtol=1e-4)
    reloaded = load_preference_model(directory)
    assert reloaded.score(sequences) == pytest.approx(wanted.tolist(), abs=1e-5)


def test_an_adapter_keeps_its_head_and_loads_in_plain_peft(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, token_ids, tmp_path: Path
) -> None:
    model = make(model_dir, LORA)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in trained)
    assert all("lora_" in n or "lm_head" in n for n in trained)
    directory = publish(model, tokenizer, tmp_path / "rm")
    sequences = token_ids(9, 30)
    wanted = hidden_scores(model, sequences)
    reloaded = load_preference_model(directory)
    assert reloaded.score(sequences) == pytest.approx(wanted.tolist(), abs=1e-5)
    again = make(model_dir, LORA)
    with torch.no_grad():
        lm_head(again.get_base_model()).weight.zero_()
    load_state(again, directory)
    assert torch.equal(lm_head(again.get_base_model()).weight, lm_head(model.get_base_model()).weight)
    base = Dots1ForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    plain = PeftModel.from_pretrained(base, directory)
    for sequence, score in zip(sequences, wanted, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(plain(torch.tensor([sequence])).logits[0, 0], score, atol=1e-4, rtol=1e-4)


def test_a_critic_can_start_from_a_reward_model(model_dir: Path, tokenizer, tmp_path: Path) -> None:
    model = make(model_dir)
    directory = publish(model, tokenizer, tmp_path / "rm")
    critic = load_critic(ModelSection(path=str(directory)), ParallelSection(), False)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in critic.named_parameters())


def test_each_kind_of_checkpoint_is_refused_where_the_other_is_wanted(
    model_dir: Path, tokenizer, tmp_path: Path
) -> None:
    full = publish(make(model_dir), tokenizer, tmp_path / "full")
    adapter = publish(make(model_dir, LORA), tokenizer, tmp_path / "adapter")
    for directory in (full, adapter):
        with pytest.raises(ValueError, match="this is a reward model, which says how good an answer is and gives none"):
            load_model(ModelSection(path=str(directory)))
    with pytest.raises(ValueError, match=r"this is no reward model, it has no score\.weight"):
        load_preference_model(model_dir)
    with pytest.raises(ValueError, match="no such checkpoint directory"):
        load_preference_model(tmp_path / "nowhere")


def test_scores_do_not_depend_on_company_and_read_what_was_said(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    directory = publish(make(model_dir), tokenizer, tmp_path / "rm")
    model = load_preference_model(directory)
    assert not model.model.training
    prompt = Prompt([Message("user", "12加30等于多少？")], "42")
    texts = ["42", "12+30: 2+0=2, 1+3=4. \\boxed{42}", "no"]
    responses = [Response(prompt, text) for text in texts] + [Response(prompt, "no", finish_reason="length")]
    scores = model(responses)
    assert model(responses) == scores
    model.max_batch_tokens = 1
    assert model(responses) == pytest.approx(scores, abs=1e-5)
    ids = [encode_conversation(tokenizer, [*prompt.messages, Message("assistant", t)]).input_ids for t in texts]
    assert scores == pytest.approx(hidden_scores(model.model, [*ids, ids[2][:-1]]).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="reward model's context 256"):
        model([Response(prompt, "ha" * 400)])


def test_pairs_end_with_their_turn_and_long_ones_are_left_out(tokenizer: PreTrainedTokenizerFast, caplog) -> None:
    prompt = [Message("user", "12加30等于多少？")]
    pairs = [PreferencePair(prompt, "42", "43", "a:1"), PreferencePair(prompt, "42" * 30, "43", "a:2")]
    with caplog.at_level("WARNING", logger="dots_align"):
        (row,) = encode_pairs(tokenizer, pairs, 64)
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["chosen_ids"]).endswith("<|response|>42<|endofresponse|>")
    assert "1 of 2 pairs are longer than train.max_length=64" in caplog.text
    with pytest.raises(ValueError, match="all 2 pairs are longer"):
        encode_pairs(tokenizer, pairs, 8)

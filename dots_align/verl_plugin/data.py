"""The recipe's prompts as a dataset of verl's, in the order in which the embedded loop draws them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from dots_align.data.chat import stop_token_ids
from dots_align.data.encoding import encode_prompts
from dots_align.data.sources import load_prompts
from dots_align.stages.rollouts import PromptSampler
from dots_align.verl_plugin.recipe import recipe_of


class PromptDataset(Dataset):
    """One row for each prompt that the run draws, so its length is that of the run.

    Args:
        data_files: the run's run.json. tokenizer: the policy's.
    """

    def __init__(
        self, data_files: Any, tokenizer: PreTrainedTokenizerBase, config: Any, processor: Any = None, **_: Any
    ) -> None:
        self.record = data_files if isinstance(data_files, str) else data_files[0]
        recipe = recipe_of(self.record)
        self.prompts = load_prompts(recipe.data, recipe.seed)
        self.stop_token_ids = list(stop_token_ids(tokenizer))
        room = AutoConfig.from_pretrained(tokenizer.name_or_path, local_files_only=True).max_position_embeddings
        asked = [(p.messages, p.source) for p in self.prompts]
        self.prompt_ids = encode_prompts(tokenizer, asked, room, recipe.rollout.max_tokens)
        self.sampler = PromptSampler(len(self.prompts), recipe.seed)
        self.length = recipe.train.max_steps * recipe.train.num_prompts_per_step
        self.seed = recipe.seed << 40

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        ((_, index),) = self.sampler.draw(position, 1)
        prompt = self.prompts[index]
        sampling = {
            "prompt_ids": self.prompt_ids[index],
            "seed": self.seed + position,
            "stop_token_ids": self.stop_token_ids,
        }
        return {
            "raw_prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
            "data_source": "dots_align",
            "reward_model": {"style": "rule", "ground_truth": prompt.answer},
            "extra_info": {"index": position, "source": prompt.source, **sampling},
            "index": position,
            "tools_kwargs": {},
            "interaction_kwargs": {},
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),  # verl's batches must hold a tensor
        }

#!/usr/bin/env python3
"""Makes an untrained checkpoint of a preset in which every trait of dots1 counts: what a reader loses moves its logits.

    scripts/make_checkpoint.py tiny DIRECTORY

A fresh model has no correction bias and norms of one; here both are random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dots_align.checkpoint import save_model, staged
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.model.dots1 import PRESETS, create_model, preset_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=[name for name in PRESETS if name != "llm1"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = preset_config(options.preset)
    tokenizer = train_tokenizer(synthetic.corpus(400), shape.vocab_size, shape.max_position_embeddings)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = create_model(preset_config(options.preset, **ends), options.seed, stop_token_ids(tokenizer))
    generator = torch.Generator().manual_seed(options.seed + 1)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith(("e_score_correction_bias", "norm.weight")):
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=generator) - 0.1
    with staged(options.directory.resolve(), {"stage": "init", "step": 0, "recipe": {}}) as staging:
        save_model(model, tokenizer, staging)


if __name__ == "__main__":
    main()

"""What the tests of the DeepSpeed back end do on every rank."""

from __future__ import annotations

from stage_cases import run_command


def run_command_in_bf16(arguments: list[str]) -> None:
    """`run_command` in bfloat16 without a GPU: it computes there, only slowly, so transformers and we refuse it."""
    from transformers import training_args

    from dots_align.stages import zero

    training_args.is_torch_bf16_gpu_available = lambda: True
    zero.check_deepspeed = lambda recipe, world_size: None
    run_command(arguments)

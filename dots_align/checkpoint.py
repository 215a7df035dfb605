"""Checkpoints: published whole or not at all, found again after a crash, linked as `last` and `best`.

A checkpoint is written into a hidden staging directory, sealed with a manifest of its files, and renamed into place.
Whatever has a name without a dot is therefore complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import Dots1Config, PreTrainedModel, PreTrainedTokenizerBase

from dots_align import __version__
from dots_align.config import LoraSection, ModelSection, ParallelSection, recipe_dict
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.encoding import encode_prompts
from dots_align.data.tokenizer import load_tokenizer, train_tokenizer
from dots_align.model.dots1 import create_model, lm_head, load_base_model, materialize, meta_model, preset_config
from dots_align.model.expert_parallel import check_layout, is_sharded, reshard, shard_model
from dots_align.model.heads import (
    REWARD_MODEL,
    attach_scalar_head,
    has_scalar_head,
    is_scalar,
    save_reward_model,
)
from dots_align.model.lora import (
    ADAPTER_CONFIG,
    PeftModel,
    adapter_base,
    add_adapter,
    initialise_adapter,
    is_reward_adapter,
    load_adapter_weights,
    merge_adapter,
    save_adapter,
)
from dots_align.model.merged_files import open_weights
from dots_align.model.sharded_io import VALUE_HEAD, load_weights, own_part, place_part, save_weights
from dots_align.run_directory import recipe_hash
from dots_align.runtime import (
    barrier,
    device,
    is_main_process,
    leave_to_main,
    logger,
    now,
    on_main,
    start_processes,
    world_size,
    write_json,
)
from dots_align.types import Prompt

MANIFEST = "manifest.json"
UNSEALED = (MANIFEST, "README.md")  # a model card may be edited without the checkpoint being damaged
PREFIX = "checkpoint-"
IDENTIFYING = ("*.safetensors", "config.json", ADAPTER_CONFIG, "tokenizer*", "chat_template*", "vocab*", "merges*")


@contextmanager
def staged(final: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Yields an empty staging directory; on success seals it with `manifest` and renames it to `final`.

    An exception, or the process dying, leaves no `final`; leftovers of earlier deaths are removed here. Of several
    processes all enter and may write; the main one makes, seals and renames.
    """
    staging = final.with_name(f".{final.name}.staging")
    on_main(lambda: _make_empty(staging))
    try:
        yield staging
        barrier()
        on_main(lambda: seal_and_publish(staging, final, manifest))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def seal_and_publish(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Seals a finished staging directory and gives it its name."""
    seal(staging, manifest)
    publish(staging, final)


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest: what made this checkpoint, and the size and SHA-256 of every file in it."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in UNSEALED
    }
    write_json(
        directory / MANIFEST,
        {"format": 1, **manifest, "version": __version__, "created": now(), "files": files},
    )


def publish(staging: Path, final: Path) -> None:
    """Renames a sealed directory into place, durably: its files are on disk before its name is."""
    readable = (staging / MANIFEST).stat().st_mode  # safetensors makes files that only their owner may read
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(readable)
            _sync(path)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)  # a process that dies while deleting leaves nothing half deleted under the name
    staging.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_for(recipe: Any, step: int, data_hash: str) -> dict[str, Any]:
    return {
        "stage": recipe.stage,
        "step": step,
        "recipe": recipe_dict(recipe),
        "recipe_hash": recipe_hash(recipe),
        "data_hash": data_hash,
    }


def read_json(path: Path) -> Any:
    """Raises ValueError, which names it, for a file that holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, no JSON ({error}); copy the checkpoint again") from None


def check_whole(directory: str | Path) -> None:
    """Raises ValueError if a checkpoint directory is missing files; sizes are compared, contents are not read."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such checkpoint directory")
    if not (directory / "config.json").is_file() and not (directory / ADAPTER_CONFIG).is_file():
        of_run = f"; this is a run, give one of its checkpoints: {directory / 'last'}"
        raise ValueError(
            f"{directory}: not a checkpoint directory: it has neither config.json nor {ADAPTER_CONFIG}"
            f"{of_run if (directory / 'last').exists() else ''}"
        )
    for name, size, listed_in in _expected_files(directory):
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory}: {name} is missing, which {listed_in} names; copy the checkpoint again")
        if size is not None and path.stat().st_size != size:
            raise ValueError(
                f"{directory}: {name} has {path.stat().st_size} bytes, {listed_in} says {size}; copy it again"
            )


def fingerprint(directory: Path) -> str:
    """Identifies the weights and the tokenizer of a whole checkpoint, an adapter's with its base's, wherever they lie:
    16 hexadecimal digits. Where no manifest has the sums of the files, their sizes and samples of them stand in.
    """
    digest = hashlib.sha256()
    for part in filter(None, (directory, adapter_base(directory))):
        manifest = part / MANIFEST
        if manifest.is_file():
            content = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        else:
            paths = sorted({path for pattern in IDENTIFYING for path in part.glob(pattern)})
            content = {path.name: [path.stat().st_size, _sampled_sha256(path)] for path in paths}
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _sampled_sha256(path: Path, pieces: int = 32, size: int = 1 << 15) -> str:
    """Over up to 1 MiB, evenly spread: the weights of a large model would take an hour to read."""
    digest, length = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as stream:
        for number in range(pieces):
            stream.seek(max(length - size, 0) * number // (pieces - 1))
            digest.update(stream.read(size))
    return digest.hexdigest()


def _expected_files(directory: Path) -> Iterator[tuple[str, int | None, str]]:
    manifest, index = directory / MANIFEST, directory / "model.safetensors.index.json"
    if manifest.is_file():
        for name, entry in read_json(manifest)["files"].items():
            yield name, entry["bytes"], MANIFEST
    if index.is_file():
        for name in sorted(set(read_json(index)["weight_map"].values())):
            yield name, None, index.name
    elif not manifest.is_file() and not (directory / ADAPTER_CONFIG).is_file():
        yield "model.safetensors", None, "every unsharded checkpoint"


def checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints of a run, oldest first."""
    found = [p for p in run_dir.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint that passes `check_whole`; damaged ones are skipped, and said so."""
    for checkpoint in reversed(checkpoints(run_dir)):
        try:
            check_whole(checkpoint)
        except ValueError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        return checkpoint
    return None


def evaluation_of(checkpoint: Path) -> dict[str, float]:
    """The metrics in a checkpoint's eval.json; empty if it was never evaluated."""
    path = checkpoint / "eval.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.is_file() else {}


def linked(run_dir: Path, name: str) -> Path | None:
    """The checkpoint that the link `run_dir/name` leads to, if there is one."""
    path = run_dir / name
    return run_dir / path.readlink() if path.is_symlink() and path.exists() else None


def link(run_dir: Path, name: str, target: Path) -> None:
    """Points the symbolic link `run_dir/name` at a checkpoint, atomically."""
    if not is_main_process():
        return
    temporary = run_dir / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, run_dir / name)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes weights (safetensors, the hub's per-expert names; an adapter only its own), config and tokenizer.
    Collective where the model is sharded.
    """
    reshard(model)
    if isinstance(model, PeftModel):
        save_adapter(model, directory)
    elif has_scalar_head(model):
        save_reward_model(model, directory)
    elif is_sharded(model):
        save_weights(model, directory)
        if is_main_process():
            model.config.save_pretrained(directory)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(directory)
    elif is_main_process():
        model.save_pretrained(directory)
    if is_main_process():
        tokenizer.save_pretrained(directory)


def load_model(
    model: ModelSection, onto: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a checkpoint directory, full or adapter (merged into its base), `onto` a device, with its tokenizer.

    Raises:
        ValueError: no such directory, a missing or damaged shard, or not a dots1 checkpoint.
    """
    directory, base = model_directories(model)
    try:
        loaded = load_base_model(base, model.dtype, model.attn_implementation, model.experts_implementation)
        if base != directory:
            loaded = merge_adapter(loaded, directory)
        tokenizer = load_tokenizer(directory)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory}: cannot be loaded: {error}") from None
    if onto is not None:
        loaded = loaded.to(onto)  # pyright: ignore[reportArgumentType] - transformers wraps `to` in an untyped decorator
    return loaded, tokenizer


def model_directories(model: ModelSection, scalar_head: bool = False) -> tuple[Path, Path]:
    """The checkpoint directory a recipe names, and the one of the full weights (an adapter's base); both are whole.
    Of a link it is the directory it leads to now: `last` may be another one before all files are read.

    Args:
        scalar_head: a reward model will do too.
    """
    if model.path is None:
        raise ValueError("model.path is not set; give a checkpoint directory, or model.preset=tiny for fresh weights")
    directory = Path(_lasting(model))
    check_whole(directory)
    _check_architecture(directory, scalar_head)
    base = adapter_base(directory) or directory
    if base != directory:
        check_whole(base)
    _check_config(base)
    return directory, base


def encode_rollout_prompts(model: ModelSection, prompts: Sequence[Prompt], max_tokens: int) -> list[list[int]]:
    """Token ids of prompts, from a checkpoint's tokenizer and configuration alone: no weight is loaded.

    Raises:
        ValueError: a prompt and an answer of `max_tokens` tokens do not fit into the checkpoint's context.
    """
    directory, base = model_directories(model)
    room = Dots1Config.from_pretrained(base, local_files_only=True).max_position_embeddings
    return encode_prompts(load_tokenizer(directory), [(p.messages, p.source) for p in prompts], room, max_tokens)


def load_trainable(
    model: ModelSection,
    parallel: ParallelSection | None,
    bf16: bool,
    lora: LoraSection | None = None,
    seed: int = 0,
    scalar_head: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model a stage trains, on its device: whole on a single process, else every rank's part of it.

    Args:
        parallel: None: whole on every process.
        bf16: compute in bfloat16; parameters, gradients' sum and optimizer stay in the dtype of `model.dtype`.
        lora: fresh adapters to put on; the rest is then frozen.
        seed: of the adapters' initial values.
        scalar_head: a head of one row in the language-model head's place: the checkpoint's if that is a critic's or a
        reward model's; else it starts at 0, and so does all that it says.

    Raises:
        ValueError: as `load_model`, or a layout that is impossible for this launch, before any weight is read.
    """
    spread = parallel is not None and (world_size() > 1 or bf16)
    if not spread and not scalar_head:
        loaded, tokenizer = load_model(model, device())
        if lora is not None:
            loaded = add_adapter(loaded, lora, _lasting(model), seed)
        loaded._is_accelerate_prepared = True  # pyright: ignore[reportAttributeAccessIssue] - or a launch of one is DDP
        return loaded, tokenizer
    directory, base = model_directories(model, scalar_head)
    files = open_weights(directory)
    tokenizer = load_tokenizer(directory)
    loaded: Any = meta_model(base, model.dtype, model.attn_implementation, model.experts_implementation)
    if scalar_head:
        attach_scalar_head(loaded)
    if lora is not None:
        loaded = add_adapter(loaded, lora, _lasting(model), seed)
    if parallel is not None and spread:
        start_processes(parallel.timeout_minutes)
        shard_model(loaded, parallel, torch.bfloat16 if bf16 else None, device().type)
    loaded._is_accelerate_prepared = True
    materialize(loaded, device())
    fresh_head = scalar_head and not is_scalar(files.shape(VALUE_HEAD))
    load_weights(loaded, files, leave_out=(VALUE_HEAD,) if fresh_head else ())
    if fresh_head:
        with torch.no_grad():
            own_part(lm_head(loaded).weight)[0].zero_()
    if lora is not None:
        initialise_adapter(loaded, seed, place_part)
    return loaded, tokenizer


def _lasting(model: ModelSection) -> str:
    """The path of a checkpoint as an adapter should remember it: `last` will be another one after the next run."""
    path = Path(str(model.path))
    return str(path.parent / path.readlink() if path.is_symlink() else path)


def load_state(model: Any, directory: Path) -> None:
    """Puts a checkpoint of the same run, full or adapter, into a (possibly sharded) model."""
    reshard(model)
    if isinstance(model, PeftModel):
        load_adapter_weights(model, directory, place_part)
    else:
        load_weights(model, directory)


def check_parallel(recipe: Any) -> None:
    """Raises ValueError for a layout this launch cannot have, before anything is loaded; the main process says it, the
    others just end.
    """

    try:
        check_layout_of(recipe, world_size())
    except ValueError:
        if is_main_process():
            raise
        leave_to_main()


def check_layout_of(recipe: Any, num_processes: int) -> None:
    """Raises ValueError if `recipe.parallel` is impossible for the recipe's model on so many processes."""
    if recipe.model.preset is not None:
        num_experts: Any = preset_config(recipe.model.preset).n_routed_experts
    else:
        _, base = model_directories(recipe.model)
        num_experts = json.loads((base / "config.json").read_text(encoding="utf-8"))["n_routed_experts"]
    check_layout(recipe.parallel, num_processes, num_experts)


def stored_dtype(directory: Path) -> Literal["float32", "bfloat16"]:
    """The dtype the weights (an adapter's: its base's) are stored in, as far as dots_align computes in it."""
    config = json.loads(((adapter_base(directory) or directory) / "config.json").read_text(encoding="utf-8"))
    return "bfloat16" if (config.get("dtype") or config.get("torch_dtype")) == "bfloat16" else "float32"


def _check_architecture(directory: Path, scalar_head: bool = False) -> None:
    config = directory / "config.json"
    found = [REWARD_MODEL] if is_reward_adapter(directory) else ["Dots1ForCausalLM"]
    if config.is_file():
        found = read_json(config).get("architectures") or ["none"]
    if REWARD_MODEL in found and not scalar_head:
        raise ValueError(
            f"{directory}: this is a reward model, which says how good an answer is and gives none; take the "
            "checkpoint that it was trained from"
        )
    if "Dots1ForCausalLM" not in found and REWARD_MODEL not in found:
        raise ValueError(f"{directory}: this is a {found[0]} checkpoint; dots_align trains Dots1ForCausalLM")


def _check_config(directory: Path) -> None:
    try:
        config = Dots1Config.from_pretrained(directory, local_files_only=True)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{directory / 'config.json'}: {str(error).splitlines()[-1].strip()}") from None
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{directory / 'config.json'}: the weights are quantized; give a checkpoint that is not")


def ensure_start(recipe: Any, run_dir: Path) -> ModelSection:
    """The checkpoint a stage starts from. Fresh weights are made once and kept as `run_dir/init`, so a resume finds
    the same.
    """
    if recipe.model.preset is None:
        if recipe.model.path is None:
            return recipe.model
        # The same one for all processes, and for all models of the stage.
        return recipe.model.model_copy(update={"path": on_main(lambda: _lasting(recipe.model))})
    on_main(lambda: _make_start(recipe, run_dir / "init"))
    return recipe.model.model_copy(update={"path": str(run_dir / "init"), "preset": None})


def _make_start(recipe: Any, init: Path) -> None:
    if not (init / MANIFEST).is_file():
        context = preset_config(recipe.model.preset).max_position_embeddings
        size = preset_config(recipe.model.preset).vocab_size
        tokenizer = train_tokenizer(synthetic.corpus(), size, context)
        config = preset_config(
            recipe.model.preset, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model = create_model(config, recipe.seed, stop_token_ids(tokenizer))
        staging = init.with_name(f".{init.name}.staging")
        _make_empty(staging)
        save_model(model, tokenizer, staging)
        manifest = {"stage": "init", "step": 0, "recipe": recipe_dict(recipe), "data_hash": ""}
        seal_and_publish(staging, init, manifest)


def tensor_names(directory: Path) -> list[str]:
    """Names of all tensors in a directory's safetensors files."""
    names: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            names += shard.keys()
    return sorted(names)

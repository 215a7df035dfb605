"""The model card: README.md of an exported checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from transformers import Dots1Config

from dots_align import __version__
from dots_align.export.curves import FILE
from dots_align.export.source import History, TrainedStage

HUB_ORGANISATION = "rednote-hilab"
# Below this a model shows that the pipeline works; it is not good for anything else.
DEMONSTRATION_PARAMETERS = 10**9
STAGE_NAMES = {
    "sft": "supervised fine-tuning",
    "rft": "rejection-sampling fine-tuning",
    "dpo": "direct preference optimisation",
    "grpo": "reinforcement learning (GRPO)",
    "ppo": "reinforcement learning (PPO)",
}
# What a reader asks of each stage first; keys that a recipe does not have, or has as null, are left out.
SHOWN_KEYS = (
    "data.path",
    "optim.learning_rate",
    "optim.lr_scheduler_type",
    "train.num_train_epochs",
    "train.max_steps",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.max_length",
    "train.num_prompts_per_step",
    "rollout.group_size",
    "rollout.temperature",
    "rollout.max_tokens",
    "algorithm.name",
    "algorithm.advantage_estimator",
    "algorithm.policy_loss",
    "algorithm.kl_coef",
    "beta",
    "loss_type",
    "lora.r",
    "lora.lora_alpha",
    "rewards",
    "seed",
)


def model_card(
    config: Dots1Config,
    parameters: tuple[int, int],
    history: History,
    verification: dict[str, Any] | None = None,
    gguf: dict[str, dict[str, Any]] | None = None,
    hf: bool = True,
    usage: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        config: of the exported model.
        parameters: all, and active per token.
        history: what trained it.
        verification: result of `verify_export`, if it ran.
        gguf: result of `verify_gguf`, by format; the formats that are there.
        hf: whether there are files for transformers.
        usage: how to load them, if not as a whole model.
    """
    formats = list(gguf or {})
    how = [
        *([usage or USAGE] if hf else []),
        *(GGUF_USAGE.replace("FILE", f"model-{f}.gguf") for f in formats[-1:]),
        LAYOUT,
    ]
    sections = [
        _front_matter(history, formats, hf),
        _what_it_is(config, parameters, history, formats, hf),
        "## Training\n\n" + _training(history),
        "## Evaluation\n\n" + _evaluation(history),
        "## Use\n\n" + "\n\n".join(how),
        "## Limitations\n\n" + _limitations(parameters[0]),
        "\n\n".join([_provenance(verification), *(_gguf_provenance(f, proof) for f, proof in (gguf or {}).items())]),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(history: History, formats: list[str], hf: bool) -> str:
    stages = dict.fromkeys(s.stage for s in history.stages)
    fields: dict[str, Any] = {
        "license": "mit",
        "library_name": "transformers" if hf else "gguf",
        "pipeline_tag": "text-generation",
        "language": ["zh", "en"],
        "tags": ["dots1", "mixture-of-experts", "chat", "dots-align", *(["gguf"] if formats else []), *stages],
    }
    if history.base is not None and not history.base.startswith("preset:"):
        released = history.base.startswith("dots.llm1")
        fields["base_model"] = f"{HUB_ORGANISATION}/{history.base}" if released else history.base
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + "---"


def _what_it_is(
    config: Dots1Config, parameters: tuple[int, int], history: History, formats: list[str], hf: bool
) -> str:
    stages = " → ".join(s.stage for s in history.stages) or "no training"
    experts = f"{config.n_routed_experts} routed, {config.num_experts_per_tok} chosen per token"
    stored = [f"{str(config.dtype).removeprefix('torch.')}, safetensors"] if hf else []
    stored += [f"GGUF {', '.join(formats)}"] if formats else []
    return f"""# A dots1 chat model

A mixture-of-experts chat model of the dots.llm1 architecture (`Dots1ForCausalLM`), trained with
dots_align: {_base(history)} → {stages}.

| | |
|---|---|
| parameters | {_count(parameters[0])} in all, {_count(parameters[1])} active per token |
| layers, hidden size | {config.num_hidden_layers}, {config.hidden_size} |
| experts | {experts}, {config.n_shared_experts} shared |
| vocabulary, context | {config.vocab_size:,} tokens, {config.max_position_embeddings:,} tokens |
| stored as | {"; ".join(stored)} |
| languages | Chinese, English |"""


def _base(history: History) -> str:
    if history.base is None:
        return "fresh weights"
    preset = history.base.removeprefix("preset:")
    return f"fresh weights (preset `{preset}`)" if preset != history.base else f"`{history.base}`"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _training(history: History) -> str:
    if not history.stages:
        return f"None: {_base(history)}, as they are."
    parts = [f"Started from {_base(history)}. The full recipes are in `manifest.json`."]
    for number, stage in enumerate(history.stages, 1):
        rows = _table(("setting", "value"), [(f"`{key}`", value) for key, value in _settings(stage)])
        name = STAGE_NAMES.get(stage.stage, stage.stage)
        parts.append(f"### {number}. {stage.stage}: {name}, {stage.step} steps\n\n{rows}")
        if made := _made_by(stage):
            parts.append(made)
    if any(stage.curves for stage in history.stages):
        parts.append(f"![Training curves]({FILE})")
    return "\n\n".join(parts)


def _made_by(stage: TrainedStage) -> str:
    """What identifies the data, the recipe and the code of a stage."""
    known = {"data": stage.data_hash, "recipe": stage.recipe_hash, "dots_align": stage.version}
    said = [f"{name} `{value}`" for name, value in known.items() if value]
    return f"Made from {', '.join(said)}." if said else ""


def _settings(stage: TrainedStage) -> Iterable[tuple[str, str]]:
    for key in SHOWN_KEYS:
        value: Any = stage.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if key == "rewards" and value:
            value = [f"{r['function']} × {r['weight']:g}" for r in value]
        if value is not None:
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _evaluation(history: History) -> str:
    evaluated = [(s, s.evaluation) for s in history.stages if s.evaluation]
    if not evaluated:
        return "Not evaluated."
    names = list(dict.fromkeys(name for _, e in evaluated for name in e["metrics"]))
    rows = [
        (
            f"{stage.stage}, step {stage.step}",
            *(f"{e['metrics'][name]:.4g}" if name in e["metrics"] else "–" for name in names),
            str(e.get("num_prompts", "–")),
            str(e.get("data", "–")),
        )
        for stage, e in evaluated
    ]
    table = _table(("checkpoint", *names, "prompts", "data"), rows)
    note = "Greedy decoding. `exact_match` and `stop_rate` are shares of the prompts, `mean_length` is in tokens."
    if history.stages[-1].evaluation is None:
        note += " The exported checkpoint itself was not evaluated."
    return f"{table}\n\n{note}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        # A bar would open another cell, and a line break would end the table.
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
messages = [{"role": "user", "content": "What is 17 plus 25?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Or in a terminal: `dots-align chat DIR`."""

ADAPTER_USAGE = """This is an adapter (LoRA); it needs its base, `BASE`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(path)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE", dtype="auto"), path)
```"""

GGUF_USAGE = """```python
from llama_cpp import Llama

model = Llama("FILE", n_ctx=0, verbose=False)  # 0: the model's whole context
messages = [{"role": "user", "content": "What is 17 plus 25?"}]
answer = model.create_chat_completion(messages, max_tokens=256, temperature=0.0)
print(answer["choices"][0]["message"]["content"])
```

Or as a server: `llama-server -m FILE --jinja`."""

LAYOUT = """Chat layout (no line breaks, no BOS):
`<|system|>S<|endofsystem|><|userprompt|>U<|endofuserprompt|><|response|>A<|endofresponse|>`.
Stop at `<|endofresponse|>`. The router's `e_score_correction_bias` is part of the model, though no optimizer trains it:
keep it when you convert the weights."""


def _limitations(parameters: int) -> str:
    general = (
        "- Answers may be wrong, made up or biased; check what matters.\n"
        "- Trained for Chinese and English only, and only as far as the data above goes.\n"
        "- No safety training beyond what the stages above contain."
    )
    if parameters >= DEMONSTRATION_PARAMETERS:
        return general
    return (
        f"- **This is a demonstration.** A model of {_count(parameters)} parameters shows that the pipeline works from "
        "data to deployment; outside the kind of prompts it was trained on it has nothing to say.\n" + general
    )


def _provenance(verification: dict[str, Any] | None) -> str:
    made = f"Exported by dots_align {__version__}."
    if verification is None:
        return made
    return (
        f"{made} Reloaded by plain transformers in a fresh process before publication: {verification['num_identical']} "
        f"of {verification['num_prompts']} greedy answers identical to the training checkpoint's, token by token "
        f"({verification['num_tokens']} tokens; median difference of log-probabilities "
        f"{verification['median_logprob_difference']:.1e})."
    )


def _gguf_provenance(format: str, proof: dict[str, Any]) -> str:
    if "skipped" in proof:
        return f"model-{format}.gguf: {proof['skipped']}."
    return (
        f"model-{format}.gguf was loaded by llama.cpp in a fresh process before publication: it reads the prompts as "
        f"the same tokens, stops at the same ones, and {proof['num_best']} of {proof['num_tokens']} tokens of the "
        "training checkpoint's greedy answers are its likeliest, too "
        f"({proof['num_identical']} of {proof['num_prompts']} answers whole; median difference of the prompts' "
        f"log-probabilities {proof['median_logprob_difference']:.1e})."
    )

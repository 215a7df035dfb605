"""`dots-align parity`: one checkpoint through every engine there is, and a verdict."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Dots1Config, PreTrainedTokenizerBase

from dots_align.checkpoint import MANIFEST, check_whole, load_model, stored_dtype
from dots_align.config import ModelSection
from dots_align.data.tokenizer import load_tokenizer
from dots_align.export.gguf import write_gguf
from dots_align.export.hf import export_hf
from dots_align.model.lora import adapter_base
from dots_align.parity.compare import Comparison, aligned, compare
from dots_align.parity.definition import observe
from dots_align.parity.diagnosis import Diagnosis, Mistake, aspects
from dots_align.parity.endpoint import Endpoint
from dots_align.parity.engines import Rollout, Training, Transformers
from dots_align.parity.fresh import Exported, LlamaCpp
from dots_align.parity.observation import Asked, Engine, Observation
from dots_align.parity.questions import asked as ask_all
from dots_align.parity.questions import fixed_questions, read_questions, within_context
from dots_align.runtime import device, logger


@dataclass(frozen=True)
class Sources:
    """What to compare beside the engines of this process.

    `exported`: a directory in the hub's layout; a fresh export if None. `ggufs`: files for llama.cpp; a fresh F32 one
    if empty. `pythons`: interpreters of other environments, whose transformers reads the exported directory, too.
    `endpoints`: servers' addresses, with weights of `endpoint_precision`.
    """

    exported: Path | None = None
    ggufs: tuple[Path, ...] = ()
    pythons: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    endpoint_precision: str = "BF16"


@dataclass(frozen=True)
class Parity:
    """`rows`, one for each engine, against the definition; `sensitivity`, how far each known mistake would move this
    checkpoint's logits.
    """

    checkpoint: str
    rows: list[Comparison]
    sensitivity: dict[str, float]
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(row.problems for row in self.rows)

    @property
    def verdict(self) -> str:
        compared = [row for row in self.rows if not row.skipped]
        if self.ok:
            return f"PARITY: all {len(compared)} engines compute the same model"
        wrong = "; ".join(
            f"{row.name}: {', '.join(dict.fromkeys(row.causes)) or row.problems[0]}" for row in compared if row.problems
        )
        return f"NO PARITY: {wrong}"

    def as_dict(self) -> dict[str, Any]:
        engines = [{**row.as_dict(), "aspects": aspects(self.mistakes, row, self.sensitivity)} for row in self.rows]
        return {
            "checkpoint": self.checkpoint,
            "ok": self.ok,
            "verdict": self.verdict,
            "engines": engines,
            "sensitivity": self.sensitivity,
        }


def parity(checkpoint: Path, prompts: Path | None = None, sources: Sources = Sources()) -> Parity:
    """Runs a checkpoint through all engines, in fp32.

    Args:
        checkpoint: full, adapter (merged) or exported.
        prompts: JSONL file of prompts to use in place of the fixed ones.

    Raises:
        ValueError: the checkpoint or the prompts cannot be read. An engine that cannot run is a row of the result.
    """
    checkpoint = Path(checkpoint)
    check_whole(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    config = Dots1Config.from_pretrained(adapter_base(checkpoint) or checkpoint, local_files_only=True)
    questions = read_questions(prompts, tokenizer) if prompts else fixed_questions(tokenizer, config.vocab_size)
    asked = ask_all(within_context(questions, config.max_position_embeddings, named=bool(prompts)), tokenizer)
    with ExitStack() as stack:
        # The processes of their own first: their models are gone from memory before one is loaded here.
        outside = [_observed(e, asked) for e in _outside(checkpoint, sources, tokenizer, stack)]
    section = ModelSection(path=str(checkpoint), dtype=stored_dtype(checkpoint), attn_implementation="sdpa")
    model, tokenizer = load_model(section, device())
    model.float()
    return compare_all(str(checkpoint), model, asked, inside(model, tokenizer), outside)


def inside(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[Engine]:
    """The engines of this process."""
    return [
        Transformers(model, tokenizer),
        Transformers(model, tokenizer, "sdpa", "grouped_mm"),
        Training(model),
        Rollout(model, tokenizer, native=False),
        Rollout(model, tokenizer, native=True),
    ]


def _outside(checkpoint: Path, sources: Sources, tokenizer: PreTrainedTokenizerBase, stack: ExitStack) -> list[Engine]:
    exported = sources.exported or (checkpoint if _is_export(checkpoint) else None)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parity-")))
    if exported is None:
        exported = export_hf(checkpoint, folder / "export")
    engines: list[Engine] = [Exported(exported)]
    engines += [Exported(exported, python, f"transformers of {python}") for python in sources.pythons]
    ggufs = list(sources.ggufs) or sorted(exported.glob("*.gguf"))
    if not ggufs:
        fresh = LlamaCpp(folder / "model-F32.gguf")
        if fresh.unavailable() is None:
            write_gguf(exported, fresh.path, "F32")
        engines.append(fresh)
    engines += [LlamaCpp(path) for path in ggufs]
    engines += [Endpoint(url, tokenizer, sources.endpoint_precision) for url in sources.endpoints]
    return engines


def _is_export(directory: Path) -> bool:
    path = directory / MANIFEST
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("stage") == "export"


Observed = tuple[Engine, Observation | None, str | None, str | None]
"""An engine, what it says, or why it was skipped, or why it failed."""


def _observed(engine: Engine, asked: Asked) -> Observed:
    reason = engine.unavailable() if hasattr(engine, "unavailable") else None  # pyright: ignore[reportAttributeAccessIssue]
    if reason:
        return engine, None, reason, None
    logger.info("parity: %s", engine.name)
    try:
        return engine, engine.observe(asked), None, None
    except ValueError as error:
        return engine, None, None, str(error)


def compare_all(
    checkpoint: str, model: Any, asked: Asked, engines: Sequence[Engine], outside: Sequence[Observed] = ()
) -> Parity:
    """Compares engines, and what others said before, with the definition computed on `model`, and explains."""
    reference = observe(model, asked.questions)
    diagnosis = Diagnosis(model, asked, reference)
    rows = []
    for engine in (*engines, *outside):
        engine, found, skipped, failed = engine if isinstance(engine, tuple) else _observed(engine, asked)
        if found is None:
            row = Comparison(engine.name, skipped=skipped)
        else:
            found = aligned(asked, reference, found)
            row = compare(engine.name, asked, reference, found)
        if failed:
            row.problems.append(failed)
            row.causes.append("cannot run")
        if found is not None and row.logits_differ:
            diagnosis.explain(row, found)
        rows.append(row)
    return Parity(checkpoint, rows, diagnosis.sensitivity(), diagnosis.mistakes)

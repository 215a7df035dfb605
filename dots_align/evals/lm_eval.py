"""Tasks of lm-evaluation-harness on our engine: its prompts and metrics, our forwards. Imported only when asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from dots_align.evals.answers import Ask, answers
from dots_align.evals.likelihood import likelihoods
from dots_align.evals.statistics import Z
from dots_align.model.expert_parallel import is_sharded
from dots_align.rollout.engine import RolloutEngine
from dots_align.runtime import logger, progress
from dots_align.types import SamplingParams

MAX_TOKENS = 256  # where a task does not say, as in the harness


@dataclass(frozen=True)
class HarnessRequest:
    """`names` of tasks; `folder` with tasks of your own; `chat`: prompts are user's turns; `limit`, `num_shots` as
    there.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    chat: bool = False
    limit: int | None = None
    num_shots: int | None = None


class EngineLM(TemplateLM):
    """A dots1 model as the harness sees one.

    Log-likelihoods come from packed forwards, in which continuations share what they can of their context; texts from
    the rollout engine. A context that is too long loses its beginning, as with the harness' own back ends.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        if is_sharded(model):
            raise ValueError("tasks of lm-evaluation-harness run on one process; launch this command alone")
        self.model, self.tokenizer = model, tokenizer
        self.max_length = int(model.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the dots layout has no token at the beginning, so none is ever added."""
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template) if chat_template else ""

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Requests are (what was asked, for the cache; context ids; continuation ids)."""
        places: dict[tuple[int, ...], list[int]] = {}
        for number, (_key, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            places.setdefault(tuple(context[-room:]), []).append(number)
        questions = [(list(context), [list(requests[n][2]) for n in numbers]) for context, numbers in places.items()]
        members = list(places.values())
        found: dict[int, tuple[float, bool]] = {}
        with progress(len(requests), "lm-eval: log-likelihoods", "items") as bar:
            for place, scored in likelihoods(self.model, questions):
                for number, likelihood in zip(members[place], scored, strict=True):
                    found[number] = likelihood.logprob, likelihood.greedy
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                bar.update(len(scored))
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asks = [self._ask(request.args[0], request.args[1], number) for number, request in enumerate(requests)]
        texts: dict[int, str] = {}
        with progress(len(requests), "lm-eval: answers", "items") as bar:
            for place, found in answers(RolloutEngine(self.model), self.tokenizer, asks):
                if isinstance(found, str):
                    raise ValueError(f"lm-eval: a prompt cannot be done: {found}")
                texts[place] = found[0].text
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
                bar.update()
        return [texts[place] for place in range(len(requests))]

    def _ask(self, context: str, options: dict[str, Any], number: int) -> Ask:
        until = options.get("until") or ()
        most = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_TOKENS)
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        sampling = SamplingParams(
            temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
            max_tokens=most,
            seed=number,
        )
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        return Ask(ids, sampling, 1, (until,) if isinstance(until, str) else tuple(until))


def run_harness(model: Any, tokenizer: Any, request: HarnessRequest, checkpoint_id: str, directory: Path) -> Any:
    """Runs tasks of the harness, to results in the suite's form, named `lm-eval:<task>`. Answers are kept in
    `directory`, so that a run that was killed goes on.

    Raises:
        ValueError: there is no such task, or its data would have to be downloaded.
    """
    manager = TaskManager(include_path=str(request.folder) if request.folder else None)
    if unknown := [name for name in request.names if name not in manager.all_tasks]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        found: Any = simple_evaluate(
            model=EngineLM(model, tokenizer),
            tasks=list(request.names),
            num_fewshot=request.num_shots,
            limit=request.limit,
            apply_chat_template=request.chat,
            task_manager=manager,
            use_cache=str(directory / f"lm-eval-{checkpoint_id}"),
            bootstrap_iters=0,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"lm-eval: data of {', '.join(request.names)} is not here ({error}); --hub downloads"
        ) from None
    return {f"lm-eval:{name}": _result(name, metrics, found) for name, metrics in found["results"].items()}


def _result(name: str, metrics: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, dict[str, float]] = {}
    samples = found.get("samples", {}).get(name, [])
    for key, value in metrics.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
            called = metric if kind == "none" else f"{metric} ({kind})"
            error = metrics.get(f"{metric}_stderr,{kind}")
            error = _standard_error(samples, metric, kind) if not isinstance(error, int | float) else float(error)
            shown[called] = {"value": value, "low": value - Z * error, "high": value + Z * error}
    if not shown:
        raise ValueError(f"lm-eval: task {name} has no result")
    count = len({sample["doc_id"] for sample in samples})
    logger.info("lm-eval: %s is done", name)
    errors = {"num_errors": 0, "num_scorer_errors": 0}
    return {"task": name, "metric": next(iter(shown)), "metrics": shown, "num_items": count, **errors}


def _standard_error(samples: list[dict[str, Any]], metric: str, kind: str) -> float:
    """Of a mean over items; 0 where the harness has no number for each."""
    values = [s[metric] for s in samples if s.get("filter", "none") == kind and isinstance(s.get(metric), int | float)]
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))

"""Rollouts by a vLLM server, through TRL's client. For those who have a vLLM that computes dots1 rightly.

    VLLM_SERVER_DEV_MODE=1 vllm serve CHECKPOINT --dtype bfloat16 --logprobs-mode processed_logprobs \\
        --max-logprobs -1 --weight-transfer-config '{"backend": "nccl"}'

Versions known to compute it wrongly are refused by name. All others have to prove it: after every update the trainer's
log-probabilities of a fixed prompt are compared with the server's, which has no checksums to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from dots_align.config import VllmSection
from dots_align.model.sharded_io import as_hub
from dots_align.rollout.canary import TOLERANCES, Canary
from dots_align.rollout.scheduler import Finished
from dots_align.rollout.sync import Manifest, WeightStream
from dots_align.runtime import gather_objects, is_main_process
from dots_align.types import GenerationRequest, Sample, SamplingParams

# First version, first version that is right again, dtypes concerned (None: all), what is wrong.
_KNOWN_WRONG: tuple[tuple[str, str, tuple[torch.dtype, ...] | None, str], ...] = (
    ("0", "0.12", None, "its dots1 scales the routed experts twice"),
    ("0.12", "0.19", None, "its dots1 scales the shared experts too, by a factor that belongs to the routed ones"),
    ("0.21", "0.24", (torch.float16,), "its dots1 is wrong in float16; serve in bfloat16"),
)


def known_wrong(version: str, dtype: torch.dtype) -> str | None:
    """Why a vLLM of this version computes dots1 wrongly in this dtype; None if no reason is known.

    From 0.24 on vLLM has no dots1 of its own and runs transformers' through its Transformers back end.
    """
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return f"vLLM {version!r} is no version that could be looked up; serve a released one"
    for first, fixed, dtypes, reason in _KNOWN_WRONG:
        if Version(first) <= release < Version(fixed) and (dtypes is None or dtype in dtypes):
            return f"vLLM {version}: {reason}; use rollout.backend=local, or a vLLM from 0.24 on in bfloat16"
    return None


def _client(section: VllmSection) -> Any:
    from trl.generation.vllm_client import VLLMClient

    try:
        return VLLMClient(
            section.base_url, group_port=section.group_port, connection_timeout=section.connection_timeout
        )
    except ImportError as error:
        raise ValueError(
            "rollout.backend=vllm: TRL's client needs vllm beside it, to send weights; install the vllm of the server "
            f"here too, or use rollout.backend=local ({error})"
        ) from error
    except OSError as error:
        raise ValueError(f"rollout.vllm.base_url={section.base_url}: {error}") from error


class VllmBackend:
    """A vLLM server as a rollout back end (`RolloutBackend`).

    It can do neither routes nor the continuation of samples begun earlier, and the random numbers are its own: a seed
    repeats a rollout only as far as vLLM repeats its batches.

    Args:
        section: where the server is.
        vocabulary: size, to know wrong ids before they are sent.
        device: of the trainer; weights go out by NCCL, so updates want a CUDA device.

    Attributes:
        dtype: the server's, in which it wants to get weights.
        refusal: why it must not generate now; None if it may. A server starts with weights nobody has vouched for.

    Raises:
        ValueError: there is no server, it computes dots1 wrongly, or it was started with other options than needed.
    """

    def __init__(self, section: VllmSection, vocabulary: int, device: torch.device) -> None:
        self.section, self.vocabulary, self.device = section, vocabulary, device
        self.client = _client(section)
        self.dtype = self._checked_dtype()
        self.refusal: str | None = "the server has not been sent any weights yet"

    def _checked_dtype(self) -> torch.dtype:
        where = f"rollout.vllm.base_url={self.section.base_url}"
        try:
            version = self.client.session.get(f"{self.client.base_url}/version").json()["version"]
            served = self.client.get_server_info()["model_config"]
        except (RuntimeError, OSError, KeyError) as error:
            raise ValueError(f"{where}: {error}") from error
        dtype = getattr(torch, str(served["dtype"]).removeprefix("torch."))
        if wrong := known_wrong(version, dtype):
            raise ValueError(f"{where}: {wrong}")
        if dtype not in TOLERANCES:
            raise ValueError(f"{where}: serves in {dtype}; start it with --dtype bfloat16")
        if (mode := served["logprobs_mode"]) != "processed_logprobs":
            raise ValueError(
                f"{where}: its log-probs are {mode}, not those of the distribution sampled from; start it with "
                "--logprobs-mode processed_logprobs"
            )
        return dtype

    # -------------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        requests: list[GenerationRequest],
        return_routes: bool = False,
        on_finished: Callable[[int], object] | None = None,
    ) -> list[list[Sample]]:
        """As `RolloutBackend.generate`; of several processes each asks for its own.

        Raises:
            ValueError: something is asked for that a vLLM server cannot do; a request is impossible; the weights are
            not the trainer's.
        """
        found: list[list[Sample]] = [[] for _ in requests]
        for event in self.stream(requests, return_routes):
            found[event.request].append(event.sample)
            if on_finished is not None:
                on_finished(1)
        return found

    def stream(self, requests: list[GenerationRequest], return_routes: bool = False) -> Iterator[Finished]:
        """As `RolloutBackend.stream`; the samples of a request come together."""
        if self.refusal is not None:
            raise ValueError(f"not generating: {self.refusal}; send the weights again")
        if return_routes:
            raise ValueError("a vLLM server does not tell the experts it chose (return_routes); use the local engine")
        for number, request in enumerate(requests):
            self._check(number, request)
        with ThreadPoolExecutor(self.section.max_concurrent_requests) as pool:
            futures = {pool.submit(self._samples, n, request): n for n, request in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    for index, sample in enumerate(future.result()):
                        yield Finished(futures[future], index, sample)
            finally:  # where one has failed, those still in line are not asked
                pool.shutdown(wait=False, cancel_futures=True)

    def _check(self, number: int, request: GenerationRequest) -> None:
        if request.started:
            raise ValueError(f"request {number}: a vLLM server cannot go on with samples begun elsewhere (started)")
        if not request.prompt_ids:
            raise ValueError(f"request {number}: the prompt is empty; give at least one token")
        if request.sampling.max_tokens < 1 or request.num_samples < 1:
            raise ValueError(f"request {number}: max_tokens and num_samples must be at least 1")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocabulary:
            raise ValueError(f"request {number}: a token id lies outside the vocabulary (0 to {self.vocabulary - 1})")

    def _samples(self, number: int, request: GenerationRequest) -> list[Sample]:
        sampling = request.sampling
        answer = self._asked(
            number,
            self.client.generate,
            [request.prompt_ids],
            n=request.num_samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            generation_kwargs={
                "seed": sampling.seed,
                "stop_token_ids": list(sampling.stop_token_ids),
                "ignore_eos": True,  # stop where the request says, not where the server's configuration does
            },
        )
        samples = [
            self._sample(number, sampling, ids, [position[0] for position in logprobs])
            for ids, logprobs in zip(answer["completion_ids"], answer["logprobs"], strict=True)
        ]
        if len(samples) != request.num_samples:
            raise ValueError(
                f"request {number}: {len(samples)} samples came back, {request.num_samples} were asked for"
            )
        return samples if _is_plain(sampling) else self._with_own_logprobs(number, request, samples)

    def _sample(self, number: int, sampling: SamplingParams, ids: list[int], logprobs: list[Any]) -> Sample:
        stopped = bool(ids) and ids[-1] in sampling.stop_token_ids
        if not stopped and len(ids) != sampling.max_tokens:
            raise ValueError(
                f"request {number}: the server ended a sample after {len(ids)} tokens, neither at a stop token nor at "
                f"max_tokens ({sampling.max_tokens})"
            )
        if len(logprobs) != len(ids) or None in logprobs:
            raise ValueError(f"request {number}: the server sent no log-probs (or NaN) for some tokens of a sample")
        rollout = [0.0] * len(ids) if sampling.temperature == 0 else logprobs
        return Sample(ids, rollout, logprobs, "stop" if stopped else "length")

    def _with_own_logprobs(self, number: int, request: GenerationRequest, samples: list[Sample]) -> list[Sample]:
        """Adds the log-probs at temperature 1 without filters, by a second forward of the server's."""
        sequences = [request.prompt_ids + sample.response_ids for sample in samples]
        rows = self._asked(number, self._logprobs, sequences, len(request.prompt_ids))
        return [replace(sample, logprobs=row) for sample, row in zip(samples, rows, strict=True)]

    def _logprobs(self, sequences: list[list[int]], first: int) -> list[list[float]]:
        """The model's own log-probs of each sequence's tokens from number `first` on."""
        answer = self.client.get_sequence_logprobs(sequences, [first] * len(sequences), top_logprobs=0, temperature=1.0)
        return [[value for (value,) in row] for row in answer["actual_logprobs"]]

    def _asked(self, number: int, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return call(*arguments, **keywords)
        except Exception as error:  # TRL's client raises that for whatever the server answers
            raise ValueError(f"request {number}: the vLLM server at {self.section.base_url}: {error}") from error

    # ----------------------------------------------------------------------------------------------------- weights

    def update_weights(self, stream: WeightStream, declared: Manifest) -> None:
        """Sends weights by NCCL, under the hub's names, and compares the canary; collective, the first process sends.

        There is no certificate: vLLM keeps weights in a layout of its own.

        Args:
            declared: with a canary.

        Raises:
            ValueError: there is no CUDA device, sending failed, or the server then computes something else. Generation
            is refused until an update succeeds.
        """
        assert declared.canary is not None
        self.refusal = "a weight update has begun and not ended"
        problem = self._send(stream, declared) if is_main_process() else _drain(stream)
        problem = next((p for p in gather_objects(problem) if p), None)
        self.refusal = problem
        if problem:
            raise ValueError(problem)

    def _send(self, stream: WeightStream, declared: Manifest) -> str | None:
        metadata = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for entry in declared.entries
            for name, tensor in _hub(entry.name, torch.empty(entry.shape, dtype=entry.sent_as, device="meta"))
        ]
        items = iter(stream)
        try:
            if self.client.communicator is None:
                self.client.init_communicator(self.device)
            self.client.update_named_params(metadata, (pair for item in items for pair in _hub(*item)))
            self.client.reset_prefix_cache()
            return self._canary_problem(declared.canary)
        except Exception as error:  # noqa: BLE001 - the other processes have to be told, whatever it was
            _drain(items)
            return f"sending weights to the vLLM server at {self.section.base_url} failed: {error}"

    def _canary_problem(self, canary: Canary | None) -> str | None:
        assert canary is not None
        (found,) = self._logprobs([list(canary.token_ids)], 1)
        mean = float((torch.tensor(found) - torch.tensor(canary.logprobs)).abs().mean())
        most = max(TOLERANCES[canary.dtype].mean, TOLERANCES[self.dtype].mean)
        if mean <= most:
            return None
        return (
            f"the vLLM server at {self.section.base_url} computes something else than the trainer: the log-probs of "
            f"the canary differ by {mean:.2g} in the mean (at most {most:g} is rounding)"
        )


def _is_plain(sampling: SamplingParams) -> bool:
    """Whether what is sampled from is the model's own distribution (a greedy server's log-probs are, too)."""
    unfiltered = (sampling.top_k, sampling.top_p, sampling.min_p) == (0, 1.0, 0.0)
    return unfiltered and sampling.temperature in (0.0, 1.0)


def _hub(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as a checkpoint names it; nothing for what is in no checkpoint, the rotary frequencies."""
    return iter(()) if ".rotary_emb." in name else as_hub(name, tensor)


def _drain(items: Any) -> None:
    """Takes part in gathering what is left."""
    for _ in items:
        pass

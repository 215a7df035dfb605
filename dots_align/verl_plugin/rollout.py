"""Our rollout engine inside verl: it samples from the module that is trained, in the processes that train it.

verl asks one server for each sample by itself. The server puts the samples of a prompt together, hands prompts out to
all training processes and lets them make forwards in step, some at a time; in between, new prompts join and an abort
is heard.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from dots_align.rollout.engine import Failed, RolloutEngine
from dots_align.types import GenerationRequest, Sample, SamplingParams
from dots_align.verl_plugin.engine import policy_here
from dots_align.verl_plugin.mapping import STRATEGY

STEPS_AT_A_TIME = 128
QUIET_SECONDS = 0.05
"""Samples of a step are asked for one by one; generation starts when none has come for so long."""
STOP_REASONS = {"stop": "completed", "length": "length", "abort": "aborted"}
Ended = list[tuple[int, int, Sample | str]]
"""(ticket, index of the sample, the sample or why the prompt cannot be done)."""

_here: list[Desk] = []


class Desk:
    """Where requests reach the engine of one training process: each has a ticket, by which its samples are told."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.tickets: dict[int, int] = {}
        self.global_steps = 0  # that verl's trainer has made to the weights

    def advance(self, requests: dict[int, GenerationRequest], max_steps: int) -> Ended:
        """Takes requests in, by ticket, and makes up to `max_steps` forwards; all processes call it together. Returns
        what ended here.
        """
        ended: Ended = []
        for ticket, request in requests.items():
            if (refusal := self.engine.refusal(request)) is not None:
                ended.append((ticket, -1, refusal))
            else:
                self.tickets[self.engine.submit(request)] = ticket
        with self.engine.session():
            for _ in range(max_steps):
                if not self.engine.anyone_has_work():
                    break
                for event in self.engine.step():
                    ticket = self.tickets[event.request]
                    failed = isinstance(event, Failed)
                    ended.append((ticket, -1, event.message) if failed else (ticket, event.index, event.sample))
            busy = self.engine.anyone_has_work()
        if not busy:
            self.rest()
        return ended

    def abort(self) -> Ended:
        """What is in work, as it stands."""
        ended: Ended = []
        for number, ticket in self.tickets.items():
            ended += [(ticket, event.index, event.sample) for event in self.engine.abort(number)]
        self.rest()
        return ended

    def rest(self) -> None:
        self.tickets.clear()
        self.engine.sleep()


class WorkerRollout(BaseRollout):
    """verl's rollout in a training process: makes the desk there, and has no weights to take."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        gib = dict(self.config.engine_kwargs.get(STRATEGY) or {}).get("kv_cache_gib")
        engine = RolloutEngine(
            policy_here(),
            self.config.max_num_seqs,
            None if gib is None else int(gib * 2**30),
            self.config.max_num_batched_tokens,
        )
        _here.append(Desk(engine))

    async def resume(self, tags: list[str]) -> None:
        """Nothing to do: the cache's memory is taken when it is needed."""

    async def release(self) -> None:
        """Nothing to do: the cache's memory is given back when the last sample has ended."""

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, **_: Any
    ) -> None:
        """The weights are the trainer's own, also those under adapters; what they are called is all that is new."""
        _here[-1].global_steps = global_steps or 0


def _advance(_: Any, requests: dict[int, GenerationRequest], max_steps: int) -> tuple[Ended, int]:
    desk = _here[-1]
    return desk.advance(requests, max_steps), desk.global_steps


def _abort(_: Any) -> Ended:
    return _here[-1].abort()


@dataclass
class _Group:
    """The samples of one prompt that have been asked for, by their index: who waits, and what each began with."""

    request: GenerationRequest
    wanted: int
    waiting: dict[int, asyncio.Future[TokenOutput]] = field(default_factory=dict)
    begun: dict[int, list[int]] = field(default_factory=dict)

    def complete(self) -> GenerationRequest:
        """The request. Samples that nobody waits for, because they ended before an abort, count as ended."""
        count = max(self.waiting) + 1
        started = [
            _begun(self.begun[i]) if i in self.waiting else Sample([0], [0.0], [0.0], "stop") for i in range(count)
        ]
        return GenerationRequest(self.request.prompt_ids, count, self.request.sampling, tuple(started))


def _begun(ids: list[int]) -> Sample:
    return Sample(ids, [0.0] * len(ids), [0.0] * len(ids), "abort")


class RolloutServer:
    """A Ray actor that answers verl's agent loops. It holds no weights.

    Args:
        workers: handles of the training processes, all of them. max_tokens, min_p: for every request.
    """

    def __init__(self, workers: list[Any], max_tokens: int, min_p: float) -> None:
        self.workers, self.max_tokens, self.min_p = workers, max_tokens, min_p
        self.gathering: dict[Any, _Group] = {}
        self.ready: list[_Group] = []
        self.running: dict[int, _Group] = {}
        self.num_aborted: dict[Any, int] = {}
        self.num_tickets = self.num_asked = self.global_steps = 0
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.work: asyncio.Task[None] | None = None
        self.in_step = asyncio.Lock()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any
    ) -> TokenOutput:
        """One sample. Beside verl's sampling parameters: `seed`, `sample` (its index among `num_samples` of its
        prompt), `prompt_length` (what lies behind it was sampled before an abort) and `stop_token_ids`.
        """
        self.num_asked += 1
        length = sampling_params.get("prompt_length", len(prompt_ids))
        prompt, begun = list(prompt_ids[:length]), list(prompt_ids[length:])
        sampling = self._sampling(sampling_params, request_id, len(begun))
        key = sampling.seed, tuple(prompt)
        group = self.gathering.get(key)
        if group is None:
            wanted = self.num_aborted.pop(key, sampling_params.get("num_samples", 1))
            group = self.gathering[key] = _Group(GenerationRequest(prompt, 1, sampling), wanted)
        index = sampling_params.get("sample", 0)
        group.waiting[index] = asyncio.get_running_loop().create_future()
        group.begun[index] = begun
        if len(group.waiting) == group.wanted:
            self.ready.append(self.gathering.pop(key))
            if self.work is None or self.work.done():
                self.work = asyncio.create_task(self._work())
        return await group.waiting[index]

    def _sampling(self, given: dict[str, Any], request_id: str, num_begun: int) -> SamplingParams:
        limit = given.get("max_tokens")
        return SamplingParams(
            temperature=float(given["temperature"]),
            top_p=float(given.get("top_p", 1.0)),
            top_k=max(int(given.get("top_k", 0)), 0),
            min_p=self.min_p,
            max_tokens=self.max_tokens if limit is None else int(limit) + num_begun,
            stop_token_ids=tuple(given.get("stop_token_ids", ())),
            seed=int(given["seed"]) if "seed" in given else int(request_id[:12], 16),
        )

    async def _work(self) -> None:
        while self.ready or self.running:
            await self._quiet()
            await self.may_run.wait()
            async with self.in_step:
                try:
                    await self._advance()
                except Exception as error:  # noqa: BLE001 - told to everyone who waits
                    self._fail(error)

    async def _quiet(self) -> None:
        seen = -1
        while not self.running and seen != self.num_asked:
            seen = self.num_asked
            await asyncio.sleep(QUIET_SECONDS)

    async def _advance(self) -> None:
        requests: list[dict[int, GenerationRequest]] = [{} for _ in self.workers]
        self.ready.sort(key=lambda group: group.request.sampling.seed)
        for group in self.ready:
            requests[self.num_tickets % len(self.workers)][self.num_tickets] = group.complete()
            self.running[self.num_tickets] = group
            self.num_tickets += 1
        self.ready = []
        calls = [
            worker.__ray_call__.remote(_advance, asked, STEPS_AT_A_TIME)
            for worker, asked in zip(self.workers, requests, strict=True)
        ]
        for ended, self.global_steps in await asyncio.gather(*calls):
            self._deliver(ended)

    def _deliver(self, ended: Ended) -> None:
        for ticket, index, sample in ended:
            group = self.running[ticket]
            if isinstance(sample, str):
                for future in group.waiting.values():
                    if not future.done():
                        future.set_exception(ValueError(sample))
                group.waiting.clear()
            elif (future := group.waiting.pop(index, None)) is not None and not future.done():
                future.set_result(self._output(sample, len(group.begun[index])))
            if not group.waiting:
                del self.running[ticket]

    def _output(self, sample: Sample, num_begun: int) -> TokenOutput:
        return TokenOutput(
            token_ids=sample.response_ids[num_begun:],
            log_probs=sample.rollout_logprobs[num_begun:],
            stop_reason=STOP_REASONS[sample.finish_reason],
            num_preempted=0,
            extra_fields={"global_steps": self.global_steps},
        )

    def _fail(self, error: Exception) -> None:
        for group in [*self.running.values(), *self.ready]:
            for future in group.waiting.values():
                if not future.done():
                    future.set_exception(error)
        self.running, self.ready = {}, []

    # ----------------------------------------------------------------------------------------- what verl's replicas ask

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Ends what runs as it stands; what comes from now on waits for `resume_generation`."""
        self.may_run.clear()
        async with self.in_step:
            if not self.running:
                return
            for group in self.running.values():
                key = group.request.sampling.seed, tuple(group.request.prompt_ids)
                self.num_aborted[key] = len(group.waiting)
            for ended in await asyncio.gather(*(w.__ray_call__.remote(_abort) for w in self.workers)):
                self._deliver(ended)

    async def resume_generation(self) -> None:
        self.may_run.set()

    async def wake_up(self, *_: Any, **__: Any) -> None:
        """Nothing to do, as with the others below: the cache is there while something is generated."""

    sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = wake_up


class Replica(RolloutReplica):
    """The one replica there is: a sharded model answers with all its processes or not at all."""

    async def init_hybrid(self, worker_group: Any) -> None:
        if self.world_size != worker_group.world_size:
            raise ValueError(
                f"actor_rollout_ref.rollout: tensor_model_parallel_size x data_parallel_size is {self.world_size}, but "
                f"{worker_group.world_size} processes hold the model, and all of them have to roll out together; set "
                f"tensor_model_parallel_size={worker_group.world_size}"
            )
        await super().init_hybrid(worker_group)

    async def init_standalone(self) -> None:
        raise ValueError(
            "rollout.name=dots_align samples from the weights that are trained, where they lie; it cannot be a server "
            "of its own, so trainer.v1.trainer_mode is sync or colocate_async"
        )

    init_hybrid_colocated = init_colocated = init_standalone  # pyright: ignore[reportAssignmentType]

    async def launch_servers(self) -> None:
        own = dict(self.config.engine_kwargs.get(STRATEGY) or {})
        actor: Any = ray.remote(RolloutServer).options(num_cpus=1, max_concurrency=self.max_concurrency)
        server = actor.remote(self.workers, self.config.response_length, float(own.get("min_p", 0.0)))
        self.servers, self._server_handle = [server], server
        self._server_address = f"{STRATEGY}://{self.replica_rank}"


_ROLLOUT_REGISTRY[(STRATEGY, "async")] = f"{__name__}.{WorkerRollout.__name__}"  # verl has no function to register one
RolloutReplicaRegistry.register(STRATEGY, lambda: Replica)

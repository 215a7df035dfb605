"""llama.cpp's batched decode through its Python binding: what a rollout engine has to be measured against.

    with LlamaCpp(Path("model-F32.gguf"), num_threads=2) as anchor:
        generated = anchor.generate(prompt_ids, num_samples=16, max_tokens=128, seed=0)

Every prompt is prefilled once, all prompts in one batch, and its keys and values go to all of its samples; then one
`llama_decode` a token advances every sequence that has not ended. Tokens are drawn here, vectorised over sequences.
Weights stay in the precision of the file; flash attention is off, in which fp32 agrees with transformers.

    python scripts/llama_cpp_anchor.py model-F32.gguf --prompts 8 --samples 16 --max-tokens 128
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports] - optional: pip install '.[llama]'
import numpy as np
from gguf import GGMLQuantizationType  # numbered as ggml's own types

KV_TYPES = ("F32", "F16", "BF16")
PHYSICAL_BATCH = 512  # tokens of one computation, llama.cpp's default
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ of the library


@dataclass
class Generated:
    """Samples by prompt: `response_ids[p][s]` holds the tokens, a stop token included, `logprobs` as many numbers.

    `logprobs` are those of the model's own distribution (temperature 1). `seconds` is all of it, of which
    `prefill_seconds` went into the prompts and `sampling_seconds` into drawing tokens, outside llama.cpp. `num_cells`
    is the size of the cache, in tokens.
    """

    response_ids: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    sampling_seconds: float = 0.0
    num_cells: int = 0
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = sum(len(ids) for group in self.response_ids for ids in group)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over all of the time."""
        return self.num_tokens / self.seconds


class LlamaCpp:
    """One GGUF file, loaded; each `generate` has a context of its own, made before its clock starts."""

    def __init__(
        self,
        path: Path,
        num_threads: int = 2,
        kv_type: str = "F16",
        kv_unified: bool = True,
        flash_attention: bool = False,
    ) -> None:
        """Loads the model.

        Args:
            path: the GGUF file.
            num_threads: of every computation.
            kv_type: what keys and values are kept in, one of KV_TYPES; F32 for comparisons of logits.
            kv_unified: one buffer for all sequences, in which samples share the cells of their prompt, and every
                sequence computes scores over all of it. Otherwise each sequence has a buffer of its own, into which
                the prompt's is copied: more memory, and faster with many sequences.
            flash_attention: needs an F16 or BF16 cache to be of use.

        Raises:
            ValueError: the file cannot be loaded.
        """
        self.num_threads, self.kv_type, self.kv_unified = num_threads, kv_type, kv_unified
        self.flash_attention = flash_attention
        # The callback has to live as long as the library may log.
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if model is None:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        self._model: Any = model
        vocabulary: Any = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_model_free(self._model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        max_tokens: int | Sequence[int],
        temperature: float = 1.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> Generated:
        """Continues each prompt `num_samples` times.

        Args:
            prompts: token ids; none empty.
            num_samples: of each prompt; at most 256 sequences in all.
            max_tokens: of each sample; or a number for each prompt, for the samples of that.
            temperature: 0 is greedy.
            seed: of the draws.
            stop_token_ids: a sample ends with the first of them.

        Raises:
            ValueError: too many sequences, an empty prompt, or llama.cpp refuses the context.
        """
        if len(prompts) * num_samples > MAX_SEQUENCES or not all(prompts):
            raise ValueError(f"llama.cpp takes up to {MAX_SEQUENCES} sequences, and no prompt may be empty")
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if len(limits) != len(prompts) or min(limits) < 1:
            raise ValueError(f"max_tokens {max_tokens} for {len(prompts)} prompts: give one, or one each, at least 1")
        run = _Run(self, prompts, num_samples, limits)
        try:
            return run.generate(_Sampler(temperature, seed), frozenset(stop_token_ids))
        finally:
            run.close()


class _Sampler:
    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature = temperature
        self.random = np.random.default_rng(seed)
        self.seconds = 0.0

    def draw(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [n] and their log-probabilities [n] from logits [n, vocabulary]."""
        started = time.perf_counter()
        shifted = logits - logits.max(axis=1, keepdims=True)
        weights = np.exp(shifted)
        norms = np.log(weights.sum(axis=1))
        if self.temperature == 0:
            ids = shifted.argmax(axis=1)
        else:
            if self.temperature != 1:
                weights = np.exp(shifted / self.temperature)
            cumulative = weights.cumsum(axis=1, dtype=np.float64)
            threshold = self.random.random((len(logits), 1)) * cumulative[:, -1:]
            ids = np.minimum((cumulative <= threshold).sum(axis=1), logits.shape[1] - 1)
        logprobs = shifted[np.arange(len(ids)), ids] - norms
        self.seconds += time.perf_counter() - started
        return ids, logprobs


class _Run:
    """One call of `generate`: a context, a batch, and which sequence of llama.cpp holds which sample."""

    def __init__(self, owner: LlamaCpp, prompts: Sequence[Sequence[int]], num_samples: int, limits: list[int]) -> None:
        self.owner, self.prompts, self.num_samples, self.limits = owner, prompts, num_samples, limits
        self.num_sequences = len(prompts) * num_samples
        prompt_tokens = sum(map(len, prompts))
        capacity = max(prompt_tokens, self.num_sequences)
        if owner.kv_unified:
            cells = prompt_tokens + num_samples * sum(limits)
        else:
            # Every sequence gets an equal share, in steps of 256.
            longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
            cells = self.num_sequences * -(-longest // 256) * 256
        self.num_cells = cells
        context = llama_cpp.llama_init_from_model(owner._model, self._parameters(cells, capacity))
        if context is None:
            raise ValueError(f"llama.cpp refuses a context of {cells} cells for {self.num_sequences} sequences")
        self.context: Any = context
        self.memory: Any = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(capacity, 0, num_samples)

    def _parameters(self, cells: int, capacity: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = cells, self.num_sequences
        parameters.n_batch, parameters.n_ubatch = capacity, PHYSICAL_BATCH
        parameters.n_threads = parameters.n_threads_batch = self.owner.num_threads
        parameters.type_k = parameters.type_v = int(GGMLQuantizationType[self.owner.kv_type])
        parameters.kv_unified = self.owner.kv_unified
        on, off = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = on if self.owner.flash_attention else off
        return parameters

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def generate(self, sampler: _Sampler, stops: frozenset[int]) -> Generated:
        started = time.perf_counter()
        logits = np.repeat(self._prefill(), self.num_samples, axis=0)
        prefilled = time.perf_counter()
        ids: list[list[int]] = [[] for _ in range(self.num_sequences)]
        logprobs: list[list[float]] = [[] for _ in range(self.num_sequences)]
        running = list(range(self.num_sequences))  # the sample in each sequence of llama.cpp that has one
        slots = list(running)
        while True:
            for sample, token, logprob in zip(running, *map(np.ndarray.tolist, sampler.draw(logits)), strict=True):
                ids[sample].append(token)
                logprobs[sample].append(logprob)
            ended = {s for s in running if ids[s][-1] in stops or len(ids[s]) == self.limits[s // self.num_samples]}
            running, slots = self._retire(running, slots, ended)
            if not running:
                break
            logits = self._advance(running, slots, [ids[s] for s in running])
        groups = range(0, self.num_sequences, self.num_samples)
        return Generated(
            response_ids=[ids[g : g + self.num_samples] for g in groups],
            logprobs=[logprobs[g : g + self.num_samples] for g in groups],
            seconds=time.perf_counter() - started,
            prefill_seconds=prefilled - started,
            sampling_seconds=sampler.seconds,
            num_cells=self.num_cells,
        )

    def _prefill(self) -> np.ndarray:
        """Logits [prompts, vocabulary] after each prompt, whose cells then belong to all of its samples."""
        index = 0
        for number, prompt in enumerate(self.prompts):
            first = number * self.num_samples
            owners = range(first, first + self.num_samples) if self.owner.kv_unified else (first,)
            for position, token in enumerate(prompt):
                self._set(index, token, position, owners, wanted=position == len(prompt) - 1)
                index += 1
        logits = self._decode(index, len(self.prompts))
        if not self.owner.kv_unified:
            for first in range(0, self.num_sequences, self.num_samples):
                for other in range(first + 1, first + self.num_samples):
                    llama_cpp.llama_memory_seq_cp(self.memory, first, other, -1, -1)
        return logits

    def _advance(self, running: list[int], slots: list[int], ids: list[list[int]]) -> np.ndarray:
        """Logits [running, vocabulary] after the newest token of each sequence."""
        for index, (sample, slot, sampled) in enumerate(zip(running, slots, ids, strict=True)):
            position = len(self.prompts[sample // self.num_samples]) + len(sampled) - 1
            self._set(index, sampled[-1], position, (slot,), wanted=True)
        return self._decode(len(running), len(running))

    def _retire(self, running: list[int], slots: list[int], ended: set[int]) -> tuple[list[int], list[int]]:
        """Frees the sequences of samples that ended.

        With a buffer a sequence llama.cpp computes only runs of consecutive sequences at once, so the last ones move
        into the gaps.
        """
        if not ended:
            return running, slots
        sample_in = dict(zip(slots, running, strict=True))
        for slot, sample in list(sample_in.items()):
            if sample in ended:
                llama_cpp.llama_memory_seq_rm(self.memory, slot, -1, -1)
                del sample_in[slot]
        if not self.owner.kv_unified:
            for gap in range(len(sample_in)):
                if gap not in sample_in:
                    last = max(sample_in)
                    llama_cpp.llama_memory_seq_cp(self.memory, last, gap, -1, -1)
                    llama_cpp.llama_memory_seq_rm(self.memory, last, -1, -1)
                    sample_in[gap] = sample_in.pop(last)
        slots = sorted(sample_in)
        return [sample_in[slot] for slot in slots], slots

    def _set(self, index: int, token: int, position: int, sequences: Sequence[int], wanted: bool) -> None:
        batch = self.batch
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
        batch.n_seq_id[index] = len(sequences)
        for k, sequence in enumerate(sequences):
            batch.seq_id[index][k] = sequence

    def _decode(self, num_tokens: int, num_outputs: int) -> np.ndarray:
        """Logits [outputs, vocabulary], valid until the next call."""
        self.batch.n_tokens = num_tokens
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {num_tokens} tokens ended with status {status}")
        return np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.context), shape=(num_outputs, self.owner.vocab_size)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(16, 128), help="shortest and longest")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-type", choices=KV_TYPES, default="F16")
    parser.add_argument("--kv-unified", action="store_true", help="one buffer for all sequences")
    parser.add_argument("--flash-attention", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cache = options.kv_type, options.kv_unified, options.flash_attention
    with LlamaCpp(options.gguf, options.threads, *cache) as anchor:
        random = np.random.default_rng(0)
        shortest, longest = options.prompt_tokens
        prompts = [
            random.integers(anchor.vocab_size, size=n).tolist()
            for n in np.linspace(shortest, longest, options.prompts).round().astype(int)
        ]
        for _ in range(options.rounds):
            result = anchor.generate(prompts, options.samples, options.max_tokens)
            figures = {k: v for k, v in asdict(result).items() if k not in ("response_ids", "logprobs")}
            print(json.dumps({**figures, "tokens_per_second": result.tokens_per_second}))


if __name__ == "__main__":
    main()

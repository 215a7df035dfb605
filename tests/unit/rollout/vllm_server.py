"""A local HTTP server with the endpoints of `vllm serve` that TRL's client uses, our engine on a small model behind it.

The one thing that is not real is the road of the weights: NCCL wants GPUs, so `Road` hands them over in the process.
"""

from __future__ import annotations

import copy
import json
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Dots1ForCausalLM

from dots_align.model.packed import pack
from dots_align.model.sharded_io import WEIGHTS, load_weights
from dots_align.rollout.engine import RolloutEngine
from dots_align.types import GenerationRequest, SamplingParams


class VllmServer:
    """Runs while it is a context; `requests` are the bodies of all completions asked for, `calls` all paths."""

    def __init__(self, model: Dots1ForCausalLM, version: str = "0.30.0", **model_config: str) -> None:
        self.model = copy.deepcopy(model)
        self.version = version
        self.model_config = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs", **model_config}
        self.development = True  # VLLM_SERVER_DEV_MODE=1
        self.cut: int | None = None  # ends every sample after so many tokens
        self.broken = False  # computes NaN
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> VllmServer:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(json.loads(body) if body else {})

            def answer(self, body: dict[str, Any] | None) -> None:
                path = self.path.partition("?")[0]
                with server.lock:
                    server.calls.append(path)
                    status, found = server.answer(path, body)
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/completions":
            assert body is not None
            self.requests.append(body)
            longest = max(len(prompt) for prompt in body["prompt"]) + body["max_tokens"]
            if longest > self.model.config.max_position_embeddings:
                return 400, {"error": {"message": f"maximum context length exceeded by {longest} tokens"}}
            choices = self.scored(body) if "prompt_logprobs" in body else self.completed(body)
            return 200, {"choices": choices}
        known: dict[str, Any] = {
            "/health": {},
            "/version": {"version": self.version},
            "/v1/models": {"data": [{"id": "dots1"}]},
            "/get_world_size": {"world_size": 1},
            "/reset_prefix_cache": {"success": True},
            "/start_weight_update": {},
            "/finish_weight_update": {},
        }
        if self.development:
            known["/server_info"] = {"vllm_config": {"model_config": self.model_config, "weight_transfer_config": {}}}
        return (200, known[path]) if path in known else (404, {"detail": "Not Found"})

    def completed(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = SamplingParams(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            min_p=body["min_p"],
            max_tokens=min(body["max_tokens"], self.cut or body["max_tokens"]),
            stop_token_ids=tuple(body["stop_token_ids"]),
            seed=body["seed"],
        )
        requests = [GenerationRequest(prompt, body["n"], sampling) for prompt in body["prompt"]]
        choices = []
        for request, samples in zip(requests, RolloutEngine(self.model).generate(requests), strict=True):
            for sample in samples:
                tokens = [f"token_id:{token}" for token in sample.response_ids]
                # vLLM does not call a greedy choice certain: it tells the model's own log-prob.
                values = sample.logprobs if sampling.temperature == 0 else sample.rollout_logprobs
                values = [float("nan")] * len(values) if self.broken else values
                top = [{token: value} for token, value in zip(tokens, values, strict=True)]
                logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}
                choices.append(
                    {"prompt_token_ids": request.prompt_ids, "token_ids": sample.response_ids, "logprobs": logprobs}
                )
        return choices

    @torch.no_grad()
    def scored(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        assert body["temperature"] == 1.0
        choices = []
        for prompt in body["prompt"]:
            logits = self.model(**pack([prompt], torch.device("cpu")).model_inputs()).logits[0]
            rows = logits.float().log_softmax(-1)[:-1].gather(-1, torch.tensor(prompt[1:])[:, None]).squeeze(-1)
            told = [{str(token): {"logprob": float(row), "rank": 1}} for token, row in zip(prompt[1:], rows)]  # noqa: B905
            choices.append({"prompt_logprobs": [None, *told]})
        return choices


class Road:
    """Stands for NCCL between a client of TRL's and a server here: what is announced and sent arrives, as a checkpoint
    loads. `lost` is a suffix of names that get lost on the way.
    """

    def __init__(self, server: VllmServer, lost: str | None = None) -> None:
        self.server, self.lost = server, lost
        self.metadata: list[tuple[str, str, list[int]]] = []

    def init_communicator(self, device: Any) -> None:
        pass

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        self.metadata, arrived = metadata, {}
        for (name, dtype, shape), (sent_name, tensor) in zip(metadata, named_params, strict=True):
            assert (name, getattr(torch, dtype), shape) == (sent_name, tensor.dtype, list(tensor.shape))
            arrived[name] = tensor.clone()
        if self.lost is not None:
            arrived |= {name: torch.zeros_like(t) for name, t in arrived.items() if name.endswith(self.lost)}
        with tempfile.TemporaryDirectory() as directory, self.server.lock:
            save_file(arrived, Path(directory) / WEIGHTS)
            load_weights(self.server.model, Path(directory))

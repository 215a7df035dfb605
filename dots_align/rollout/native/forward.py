"""The native forward behind one call: the model's own tensors in, logits and routes out."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import Dots1ForCausalLM

from dots_align.model.router import moe_layers
from dots_align.rollout.kv_cache import BlockPool
from dots_align.rollout.native import build
from dots_align.rollout.plan import ForwardPlan

PHASES = (
    "embed",
    "qkv",
    "attention",
    "output",
    "router",
    "experts",
    "shared_combine",
    "dense_mlp",
    "head",
    "sampling",
    "waiting",
)
_MAX_HEAD_DIM = 256
_MAKERS = {"torch", "transformers", "builtins"}  # of modules whose weights are what they seem
_CHANGING_ROPE = ("dynamic", "longrope")  # their frequencies depend on the longest sequence of the call

_Pointer, _Int, _Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A C struct: each keyword names a type and lists its fields, in order."""
    types = {"pointers": _Pointer, "longs": ctypes.c_int64, "ints": _Int, "floats": _Float}
    layout = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": layout})


# They mirror model.h and sampling.h.
_Layer = _struct(
    "LayerWeights",
    pointers="input_norm q k v o q_norm k_norm mlp_norm gate up down router experts_gate_up experts_down "
    "correction_bias",
    longs="inner",
)
_Shape = _struct(
    "ModelShape",
    pointers="embedding final_norm head layer",
    ints="layers hidden heads kv_heads head_dim vocab experts top_k expert_inner bf16 router_bf16 normalise_gates",
    floats="eps gate_scale score_scale",
)
_Plan = _struct(
    "PlanArrays",
    pointers="ids position starts cached tables prefix_starts prefix_tables prefix_lengths logits_at trunk_starts "
    "trunk_lengths cosines sines keys values out_logits out_routes",
    ints="tokens chains table_width prefixes prefix_table_width logits block_size trunks",
)
_Sampling = _struct(
    "SamplingArrays",
    pointers="logits temperature keys positions tokens rollout_logprobs logprobs",
    ints="rows vocab",
)


# ---------------------------------------------------------------------------------------------------- what is supported


def _weights(model: Any) -> list[dict[str, torch.Tensor]]:
    """Tensors of each layer by their names in `LayerWeights`."""
    layers = []
    for layer in model.model.layers[: model.config.num_hidden_layers]:
        attention, mlp = layer.self_attn, layer.mlp
        tensors = {
            "input_norm": layer.input_layernorm.weight,
            **{name: getattr(attention, f"{name}_proj").weight for name in "qkvo"},
            "q_norm": attention.q_norm.weight,
            "k_norm": attention.k_norm.weight,
            "mlp_norm": layer.post_attention_layernorm.weight,
        }
        dense = mlp
        if hasattr(mlp, "experts"):
            dense = mlp.shared_experts
            tensors |= {
                "router": mlp.gate.weight,
                "correction_bias": mlp.gate.e_score_correction_bias,
                "experts_gate_up": mlp.experts.gate_up_proj,
                "experts_down": mlp.experts.down_proj,
            }
        tensors |= {name: getattr(dense, f"{name}_proj").weight for name in ("gate", "up", "down")}
        layers.append(tensors)
    return layers


def _config_trouble(config: Any) -> str | None:
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    for wrong, reason in (
        (config.n_group not in (None, 1), f"n_group is {config.n_group}"),
        (config.hidden_act not in ("silu", "swish"), f"hidden_act is {config.hidden_act}"),
        (config.attention_bias, "attention_bias is on"),
        (any(kind != "full_attention" for kind in config.layer_types), "it has layers with a sliding window"),
        (rope in _CHANGING_ROPE, f"rope_type is {rope}"),
        (config.hidden_size % 32, f"hidden_size {config.hidden_size} is no multiple of 32"),
        (config.head_dim % 16 or config.head_dim > _MAX_HEAD_DIM, f"head_dim is {config.head_dim}"),
        (config.intermediate_size % 16, f"intermediate_size {config.intermediate_size} is no multiple of 16"),
        (config.num_attention_heads % config.num_key_value_heads, "its key-value heads do not divide its heads"),
    ):
        if wrong:
            return reason
    return None


def _moe_trouble(model: Any) -> str | None:
    config = model.config
    for index, block in moe_layers(model):
        if getattr(block.experts, "exchange", None) is not None:
            return "its experts are spread over processes"
        if getattr(block.experts, "lora", None) is not None:
            return "its experts carry adapters"
        if block.gate.e_score_correction_bias.dtype != torch.float32:
            return f"layer {index}: e_score_correction_bias is not fp32"
        shared = block.shared_experts.gate_proj.weight.shape[0]
        if config.moe_intermediate_size % 16 or shared % 16:
            return "the experts' width is no multiple of 16"
        if not 1 <= config.num_experts_per_tok <= config.n_routed_experts <= 256:
            return f"{config.num_experts_per_tok} of {config.n_routed_experts} experts"
    return None


def _tensor_trouble(model: Any) -> str | None:
    makers = {kind.__module__.split(".")[0] for module in model.modules() for kind in type(module).__mro__}
    if "peft" in makers:
        return "it carries adapters"
    if strangers := makers - _MAKERS:
        return f"it has modules of {', '.join(sorted(strangers))}"
    dtype = model.lm_head.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {dtype}"
    named = [("lm_head", model.lm_head.weight), ("embed_tokens", model.model.embed_tokens.weight)]
    named += [("norm", model.model.norm.weight)]
    for index, tensors in enumerate(_weights(model)):
        named += [(f"layer {index}: {name}", tensor) for name, tensor in tensors.items()]
    for name, tensor in named:
        fp32_too = name.endswith(("router", "correction_bias")) and tensor.dtype == torch.float32
        if isinstance(tensor, DTensor):
            return f"{name} is sharded"
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not (tensor.dtype == dtype or fp32_too):
            return f"{name} is {tensor.dtype} on {tensor.device}, not contiguous {dtype} on the CPU"
    routers = {tensors["router"].dtype for tensors in _weights(model) if "router" in tensors}
    return "its routers differ in dtype" if len(routers) > 1 else None


def why_not(model: Any) -> str | None:
    """Why the native forward cannot run this model here, as half a sentence; None if it can."""
    if not isinstance(model, Dots1ForCausalLM):
        return f"it is a {type(model).__name__}, not a plain Dots1ForCausalLM"
    try:
        if trouble := _config_trouble(model.config) or _moe_trouble(model) or _tensor_trouble(model):
            return trouble
    except AttributeError as error:  # a module that is not what transformers makes
        return f"it is not a plain Dots1ForCausalLM ({error})"
    try:
        build.load()
    except build.Unavailable as error:
        return str(error)
    return None


def native_forward(model: Any) -> NativeForward | None:
    """The native forward of a model with whole parameters (gathered, if it is sharded), or None where `why_not` has a
    reason. It reads the tensors that the modules have now: make one for each rollout.
    """
    return None if why_not(model) else NativeForward(model)


# ---------------------------------------------------------------------------------------------------------- the forward


def _check(wrong: Any, what: str) -> None:
    if wrong:
        raise ValueError(f"the forward plan is broken: {what}")


class NativeForward:
    """One model's forward over a plan. Not for several threads at once."""

    name = "native"

    def __init__(self, model: Any) -> None:
        self.config, self.dtype = model.config, model.lm_head.weight.dtype
        self._rotary = model.model.rotary_emb
        self._library = build.load()
        self._layers = _weights(model)
        self._ends = (model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight)
        self.num_moe_layers = sum("router" in tensors for tensors in self._layers)
        self._cosines = self._sines = np.empty((0, self.config.head_dim // 2), np.float32)
        create = self._library.dots_native_create
        create.restype = _Pointer
        parallel, num_threads = (_Pointer(address) for address in build.openmp())
        self._handle = _Pointer(create(ctypes.byref(self._shape()), parallel, num_threads))
        self._destroy = weakref.finalize(self, self._library.dots_native_destroy, self._handle)

    def _shape(self) -> ctypes.Structure:
        config = self.config
        layers = (_Layer * len(self._layers))()
        for struct, tensors in zip(layers, self._layers, strict=True):
            for name, tensor in tensors.items():
                setattr(struct, name, tensor.data_ptr())
            struct.inner = tensors["gate"].shape[0]  # type: ignore[attr-defined]
        routers = [tensors["router"] for tensors in self._layers if "router" in tensors]
        embedding, norm, head = (tensor.data_ptr() for tensor in self._ends)
        moe = bool(routers)
        return _Shape(
            embedding=embedding,
            final_norm=norm,
            head=head,
            layer=ctypes.cast(layers, _Pointer),
            layers=len(self._layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            experts=config.n_routed_experts if moe else 0,
            top_k=config.num_experts_per_tok if moe else 0,
            expert_inner=config.moe_intermediate_size if moe else 0,
            bf16=self.dtype == torch.bfloat16,
            router_bf16=moe and routers[0].dtype == torch.bfloat16,
            normalise_gates=bool(config.norm_topk_prob),
            eps=config.rms_norm_eps,
            gate_scale=config.routed_scaling_factor,
            score_scale=config.head_dim**-0.5,
        )

    def __call__(self, plan: ForwardPlan, pool: BlockPool, want_routes: bool) -> tuple[torch.Tensor, np.ndarray | None]:
        """Computes the N tokens of a plan and writes their keys and values into the pool.

        A token's numbers depend bit for bit on its own history alone: not on what else is in the plan, on how its chain
        was cut into plans, or on the number of threads.

        Returns:
            logits [M, V] fp32; the experts chosen [N, MoE layers, k] uint8 by falling score if wanted, else None.

        Raises:
            ValueError: the plan contradicts itself, the pool or the model.
        """
        self._check_plan(plan, pool.num_blocks, pool.block_size)
        keys, values = self._pool_pointers(pool)
        self._rotate_up_to(int(plan.positions.max(initial=0)) + 1)
        logits = torch.empty(len(plan.logits_at), self.config.vocab_size)
        routes = None
        if want_routes and self.num_moe_layers:
            shape = plan.num_tokens, self.num_moe_layers, self.config.num_experts_per_tok
            routes = np.empty(shape, np.uint8)
        if plan.num_tokens == 0:
            return logits, routes
        arrays = _Plan(
            ids=plan.tokens.ctypes.data,
            position=plan.positions.ctypes.data,
            starts=plan.starts.ctypes.data,
            cached=plan.cached.ctypes.data,
            tables=plan.tables.ctypes.data,
            prefix_starts=plan.prefix_starts.ctypes.data,
            prefix_tables=plan.prefix_tables.ctypes.data,
            prefix_lengths=plan.prefix_lengths.ctypes.data,
            logits_at=plan.logits_at.ctypes.data,
            trunk_starts=plan.trunk_starts.ctypes.data,
            trunk_lengths=plan.trunk_lengths.ctypes.data,
            cosines=self._cosines.ctypes.data,
            sines=self._sines.ctypes.data,
            keys=ctypes.cast(keys, _Pointer),
            values=ctypes.cast(values, _Pointer),
            out_logits=logits.data_ptr(),
            out_routes=None if routes is None else routes.ctypes.data,
            tokens=plan.num_tokens,
            chains=len(plan.cached),
            table_width=plan.tables.shape[1],
            prefixes=len(plan.prefix_lengths),
            prefix_table_width=plan.prefix_tables.shape[1],
            logits=len(plan.logits_at),
            block_size=pool.block_size,
            trunks=len(plan.trunk_lengths),
        )
        self._library.dots_native_forward(self._handle, ctypes.byref(arrays), torch.get_num_threads())
        return logits, routes

    def _rotate_up_to(self, length: int) -> None:
        """Makes the rotary tables at least `length` positions long, with the model's own numbers."""
        if length <= len(self._cosines):
            return
        length = min(1 << (length - 1).bit_length(), self.config.max_position_embeddings)
        with torch.no_grad():
            tables = self._rotary(torch.empty(0, dtype=self.dtype), torch.arange(length)[None])
        half = self.config.head_dim // 2
        self._cosines, self._sines = (t[0, :, :half].float().contiguous().numpy() for t in tables)

    def _pool_pointers(self, pool: BlockPool) -> tuple[ctypes.Array[Any], ctypes.Array[Any]]:
        config = self.config
        shape = (pool.num_blocks, pool.block_size, config.num_key_value_heads, config.head_dim)
        for name, tensors in (("keys", pool.keys), ("values", pool.values)):
            if len(tensors) != len(self._layers):
                raise ValueError(f"the cache has {name} for {len(tensors)} layers, the model {len(self._layers)}")
            for tensor in tensors:
                if tensor.shape != shape or tensor.dtype != self.dtype or not tensor.is_contiguous():
                    raise ValueError(
                        f"the cache holds {name} of {tuple(tensor.shape)} {tensor.dtype}; this model needs contiguous "
                        f"{shape} {self.dtype}"
                    )
        kind = _Pointer * len(self._layers)
        return kind(*(t.data_ptr() for t in pool.keys)), kind(*(t.data_ptr() for t in pool.values))

    def _check_plan(self, plan: ForwardPlan, num_blocks: int, block_size: int) -> None:
        """Everything that C++ uses as an index."""
        config, n = self.config, plan.num_tokens
        chains, prefixes, trunks = len(plan.cached), len(plan.prefix_lengths), len(plan.trunk_lengths)
        for name, array, shape in (
            ("tokens", plan.tokens, (n,)),
            ("positions", plan.positions, (n,)),
            ("starts", plan.starts, (chains + 1,)),
            ("cached", plan.cached, (chains,)),
            ("tables", plan.tables, (chains, plan.tables.shape[-1])),
            ("prefix_starts", plan.prefix_starts, (prefixes + 1,)),
            ("prefix_tables", plan.prefix_tables, (prefixes, plan.prefix_tables.shape[-1])),
            ("prefix_lengths", plan.prefix_lengths, (prefixes,)),
            ("logits_at", plan.logits_at, (len(plan.logits_at),)),
            ("trunk_starts", plan.trunk_starts, (trunks + 1,)),
            ("trunk_lengths", plan.trunk_lengths, (trunks,)),
        ):
            right = array.dtype == np.int32 and array.shape == shape and array.flags.c_contiguous
            _check(not right, f"{name} is {array.dtype} {array.shape}, not contiguous int32 {shape}")
        if n == 0:
            return

        def outside(array: np.ndarray, end: int) -> bool:
            return array.size > 0 and not (int(array.min()) >= 0 and int(array.max()) < end)

        _check(outside(plan.tokens, config.vocab_size), "a token id lies outside the vocabulary")
        _check(outside(plan.positions, config.max_position_embeddings), "a position lies outside the context")
        _check(outside(plan.logits_at, n), "logits are wanted of a token that is not there")
        _check(outside(plan.tables, num_blocks) or outside(plan.prefix_tables, num_blocks), "a block is not there")
        lengths = np.diff(plan.starts)
        covers = plan.starts[0] == 0 and plan.starts[-1] == n and (lengths >= 0).all()
        _check(not covers, "starts do not ascend from 0 to the number of tokens")
        short = outside(plan.cached + lengths, plan.tables.shape[1] * block_size + 1) or (plan.cached < 0).any()
        _check(short, "a chain is longer than its blocks")
        if prefixes:
            at_chains = np.isin(plan.prefix_starts, plan.starts).all() and (np.diff(plan.prefix_starts) >= 0).all()
            _check(not at_chains or plan.prefix_starts[-1] != n, "prefix_starts are no starts of chains up to the end")
            longest = plan.prefix_tables.shape[1] * block_size
            _check(outside(plan.prefix_lengths, longest + 1), "a prefix is longer than its blocks")
        if trunks:
            sizes = np.diff(plan.trunk_starts)
            apart = plan.trunk_starts[0] < 0 or (sizes <= 0).any() or plan.trunk_starts[-1] != prefixes
            _check(apart, "trunk_starts do not ascend to the number of prefixes")
            shortest = np.minimum.reduceat(plan.prefix_lengths, plan.trunk_starts[:-1])
            too_long = (plan.trunk_lengths < 0).any() or (plan.trunk_lengths > shortest).any()
            _check(too_long, "a trunk is longer than a prefix that begins with it")

    # ------------------------------------------------------------------------------------------------------- sampling

    def sample_tokens(
        self, logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`sampling.sample` for rows without filters (top_p 1, top_k 0, min_p 0): the same draws but where the uniform
        number falls within rounding of the edge between two tokens.

        Args:
            logits: [M, V] fp32. temperature: [M] fp32, 0 for greedy. keys, positions: [M] int64.

        Returns:
            tokens [M] int64, -1 where a logit is NaN or none is finite; rollout_logprobs [M]; logprobs [M].
        """
        rows, vocab = logits.shape
        for name, tensor, dtype, shape in (
            ("logits", logits, torch.float32, (rows, vocab)),
            ("temperature", temperature, torch.float32, (rows,)),
            ("keys", keys, torch.int64, (rows,)),
            ("positions", positions, torch.int64, (rows,)),
        ):
            if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu":
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape} on the CPU")
        logits, temperature, keys, positions = (x.contiguous() for x in (logits, temperature, keys, positions))
        tokens = torch.empty(rows, dtype=torch.int64)
        rollout_logprobs, logprobs = torch.empty(rows), torch.empty(rows)
        arrays = _Sampling(
            logits=logits.data_ptr(),
            temperature=temperature.data_ptr(),
            keys=keys.data_ptr(),
            positions=positions.data_ptr(),
            tokens=tokens.data_ptr(),
            rollout_logprobs=rollout_logprobs.data_ptr(),
            logprobs=logprobs.data_ptr(),
            rows=rows,
            vocab=vocab,
        )
        self._library.dots_native_sample(self._handle, ctypes.byref(arrays), torch.get_num_threads())
        return tokens, rollout_logprobs, logprobs

    def profile(self) -> dict[str, float]:
        """Seconds spent in each phase since the last call, as seen by the first thread; `waiting` for the others."""
        seconds = (ctypes.c_double * len(PHASES))()
        self._library.dots_native_profile(self._handle, seconds)
        return dict(zip(PHASES, seconds, strict=True))

"""Weight updates inside one process: what a checksum sees, what a manifest lists, and when a receiver refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from transformers import Dots1ForCausalLM

from dots_align.model.router import moe_layers
from dots_align.rollout.sync import Manifest, WeightReceiver, WeightStream, checksum, manifest, stream
from dots_align.rollout.transport import Channel, receive_weights, send_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
SQUARE = "model.layers.2.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=generator).to(dtype)


@given(
    shape=st.lists(st.integers(1, 7), max_size=3).map(tuple), dtype=st.sampled_from(DTYPES), data=st.data()
)  # fmt: skip
def test_one_flipped_bit_shows(shape, dtype, data):
    tensor = random_tensor(shape, dtype)
    raw = tensor.clone().reshape(-1).view(torch.uint8)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << (0 if dtype == torch.bool else data.draw(st.integers(0, 7)))
    assert checksum(raw.view(dtype).view(shape)) != checksum(tensor)


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), dtype=st.sampled_from(DTYPES), data=st.data()
)  # fmt: skip
def test_the_parts_of_a_tensor_add_up_to_the_whole(shape, dtype, data):
    tensor = random_tensor(shape, dtype)
    dim = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dim]))
    parts = []
    for bounds in (slice(0, cut), slice(cut, shape[dim])):
        part = [bounds if d == dim else slice(0, size) for d, size in enumerate(shape)]
        parts.append(checksum(tensor[tuple(part)], part))
    assert (sum(parts) - checksum(tensor)) % (1 << 64) == 0


def test_what_changed_places_shows():
    tensor = random_tensor((4, 5, 5))
    expected = checksum(tensor)
    assert checksum(tensor.transpose(1, 2)) != expected
    assert checksum(tensor[[1, 0, 2, 3]]) != expected
    assert checksum(tensor.flip(-1)) != expected
    assert checksum(tensor.transpose(1, 2).contiguous().transpose(1, 2)) == expected  # strides are not content


def test_large_tensors_are_summed_in_chunks():
    tensor = random_tensor((3, 1000, 700))
    rows = [slice(0, 3), slice(0, 1000), slice(0, 700)]
    one_by_one = sum(checksum(tensor[:, i : i + 1], [rows[0], slice(i, i + 1), rows[2]]) for i in range(1000))
    assert (one_by_one - checksum(tensor)) % (1 << 64) == 0


def test_the_manifest_lists_everything(model: Dots1ForCausalLM):
    entries = {e.name: e for e in manifest(model, torch.bfloat16).entries}
    held = dict([*model.named_parameters(), *model.named_buffers()])
    assert entries.keys() == held.keys()
    assert all(e.shape == tuple(held[n].shape) and e.dtype == held[n].dtype for n, e in entries.items())
    assert BIAS in entries
    assert "model.rotary_emb.inv_freq" in entries  # in no checkpoint
    assert entries[EXPERTS].sent_as == torch.bfloat16
    assert entries[BIAS].sent_as == entries["model.rotary_emb.inv_freq"].sent_as == torch.float32
    kept = {e.name: e for e in manifest(model, {SQUARE: torch.bfloat16}).entries}
    assert [n for n, e in kept.items() if e.sent_as != e.dtype] == [SQUARE]


@pytest.fixture
def target(model: Dots1ForCausalLM) -> Dots1ForCausalLM:
    """A model of the same shape with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.add_(1)
    return other


def test_an_update_arrives_in_place(model: Dots1ForCausalLM, target: Dots1ForCausalLM):
    addresses = {name: p.data_ptr() for name, p in target.named_parameters()}
    receiver = WeightReceiver(target, "its weights are random")
    with pytest.raises(ValueError, match="not generating: its weights are random; send the weights again"):
        receiver.check()
    declared = manifest(model).with_canary(model)
    certificate = receiver.update(stream(model, declared), declared)
    receiver.check()
    count = len(list(model.parameters())) + len(list(model.buffers()))
    assert certificate.count_expected == certificate.count_written == count
    assert certificate.sent == certificate.held
    assert receiver.updates == 1
    assert {name: p.data_ptr() for name, p in target.named_parameters()} == addresses
    for (name, expected), found in zip(model.named_parameters(), target.parameters(), strict=True):
        assert torch.equal(expected, found), name
    for (name, expected), found in zip(model.named_buffers(), target.buffers(), strict=True):
        assert torch.equal(expected, found), name


def test_a_declared_conversion_arrives(model: Dots1ForCausalLM, target: Dots1ForCausalLM):
    engine = target.to(torch.bfloat16)
    biases = [block.gate.e_score_correction_bias for _, block in moe_layers(engine)]
    assert all(bias.dtype == torch.float32 for bias in biases)
    dtypes = {name: t.dtype for name, t in [*engine.named_parameters(), *engine.named_buffers()]}
    receiver = WeightReceiver(engine)
    declared = manifest(model, dtypes).with_canary(model)
    receiver.update(stream(model, declared), declared)
    assert torch.equal(engine.lm_head.weight, model.lm_head.weight.bfloat16())
    with pytest.raises(ValueError, match=rf"other dtype, and no conversion declared: .*{SQUARE} \(torch.float32 for"):
        receiver.update(*undeclared(model, SQUARE, dtypes))
    with pytest.raises(ValueError, match=f"not generating: the weight update does not fit.*{SQUARE}"):
        receiver.check()
    receiver.update(stream(model, declared), declared)
    receiver.check()


def undeclared(model: Dots1ForCausalLM, name: str, dtypes: dict[str, torch.dtype]) -> tuple[WeightStream, Manifest]:
    declared = manifest(model, {**dtypes, name: torch.float32})
    return stream(model, declared), declared


Fault = Callable[[dict[str, torch.Tensor]], Iterator[tuple[str, torch.Tensor]]]


def without(name: str) -> Fault:
    return lambda tensors: ((n, t) for n, t in tensors.items() if n != name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return lambda tensors: ((n, change(t.detach().clone()) if n == name else t) for n, t in tensors.items())


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int32).view(-1)[17] ^= 1
    return tensor


FAULTS: dict[str, tuple[Fault, str]] = {
    "lost bias": (without(BIAS), f"never arrived: {BIAS}"),
    "missing tensor": (without(SQUARE), f"never arrived: {SQUARE}"),
    "swapped experts": (changed(EXPERTS, lambda t: t[[1, 0, *range(2, len(t))]]), f"other bits.*: {EXPERTS}"),
    "transposed": (changed(SQUARE, lambda t: t.t()), f"other bits than were sent: {SQUARE}"),
    "one bit": (changed(EXPERTS, one_bit), f"other bits than were sent: {EXPERTS}"),
    "rounded": (changed(SQUARE, lambda t: t.bfloat16()), rf"{SQUARE} arrived as \[64, 64\] torch.bfloat16, declared"),
    "rounded and back": (changed(SQUARE, lambda t: t.bfloat16().float()), f"other bits than were sent: {SQUARE}"),
    "another shape": (changed(SQUARE, lambda t: t[:32]), rf"{SQUARE} arrived as \[32, 64\]"),
    "surplus": (lambda tensors: iter([*tensors.items(), ("lm_head.bias", torch.zeros(4))]), "lm_head.bias arrived un"),
    "twice": (lambda tensors: iter([*tensors.items(), (BIAS, tensors[BIAS])]), f"{BIAS} arrived twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_way_is_named_and_refused(model: Dots1ForCausalLM, target: Dots1ForCausalLM, fault: str):
    plant, message = FAULTS[fault]
    declared = manifest(model)
    sent = stream(model, declared)
    tensors = dict(sent)
    receiver = WeightReceiver(target)
    with pytest.raises(ValueError, match=message):
        receiver.update(WeightStream(plant(tensors), sent.checksums), declared)
    with pytest.raises(ValueError, match=f"not generating: .*{message}"):
        receiver.check()
    assert receiver.updates == 0
    receiver.update(stream(model, declared), declared)
    receiver.check()


def test_a_manifest_that_does_not_fit_is_refused_before_anything_is_written(
    model: Dots1ForCausalLM, target: Dots1ForCausalLM
):
    before = copy.deepcopy(target.state_dict())
    declared = manifest(model)
    parameters = {name for name, _ in model.named_parameters()}
    lacking = replace(declared, entries=tuple(e for e in declared.entries if e.name in parameters))
    receiver = WeightReceiver(target)
    with pytest.raises(ValueError, match=rf"missing: .*{BIAS}"):
        receiver.update(stream(model, lacking), lacking)
    renamed = replace(declared, entries=(replace(declared.entries[0], name="model.wte.weight"), *declared.entries[1:]))
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight; surplus: model.wte.weight"):
        receiver.begin(renamed)
    reshaped = replace(declared, entries=(replace(declared.entries[0], shape=(3, 64)), *declared.entries[1:]))
    with pytest.raises(ValueError, match=r"other shape: model.embed_tokens.weight \(\[3, 64\] for \["):
        receiver.begin(reshaped)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_stream_that_breaks_off_is_refused(model: Dots1ForCausalLM, target: Dots1ForCausalLM):
    declared = manifest(model)

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(stream(model, declared))[:10]
        raise OSError("the cable is cut")

    receiver = WeightReceiver(target)
    with pytest.raises(OSError, match="the cable"):
        receiver.update(WeightStream(half()), declared)
    with pytest.raises(ValueError, match="broke off: the cable is cut"):
        receiver.check()


def test_a_tensor_that_cannot_be_sent_is_told_and_nobody_waits_for_it(
    model: Dots1ForCausalLM, target: Dots1ForCausalLM
):
    declared, store, cpu = manifest(model), dist.HashStore(), torch.device("cpu")
    lost = WeightStream((name, tensor.to("meta")) for name, tensor in stream(model, declared))

    def channel(rank: int) -> Channel:
        return Channel(dist.ProcessGroupGloo(store, rank, 2, timedelta(minutes=5)), rank, 2, cpu)

    with ThreadPoolExecutor(2) as threads:
        sent = threads.submit(lambda: send_weights(model, channel(0), declared, lost))
        received = threads.submit(lambda: receive_weights(WeightReceiver(target), channel(1)))
        with pytest.raises(ConnectionError, match="the sender gave up: NotImplementedError"):
            received.result()
        with pytest.raises(NotImplementedError):
            sent.result()


class TestCanary:
    """Whatever checksums cannot see: the right bits of the wrong weights, or a model that computes something else."""

    def refused(self, sender: Dots1ForCausalLM, sent: Dots1ForCausalLM, engine: Dots1ForCausalLM) -> str:
        held = {name: t.dtype for name, t in [*engine.named_parameters(), *engine.named_buffers()]}
        declared = manifest(sent, held).with_canary(sender)
        receiver = WeightReceiver(engine)
        with pytest.raises(ValueError, match="compute something else here: ") as error:
            receiver.update(stream(sent, declared), declared)
        assert receiver.refusal == str(error.value)
        return str(error.value)

    def test_weights_that_are_not_those_that_train(self, model, target):
        stale = copy.deepcopy(model)
        with torch.no_grad():
            weights = stale.get_parameter(SQUARE)
            weights.copy_(weights.bfloat16())
        assert "canary" in self.refused(model, stale, target)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_another_scaling_of_the_experts(self, model, target, dtype):
        for _, block in moe_layers(target):
            block.routed_scaling_factor *= 2
        assert "canary" in self.refused(model, model, target.to(dtype))

    def test_a_lost_bias_in_bf16(self, model, target):
        stale = copy.deepcopy(model)
        for _, block in moe_layers(stale):
            block.gate.e_score_correction_bias.zero_()
        assert "chose other experts, with score gaps up to" in self.refused(model, stale, target.to(torch.bfloat16))

    def test_a_near_tie_that_is_rounded_the_other_way_is_no_fault(self, model, target):
        declared = manifest(model).with_canary(model)
        assert declared.canary is not None
        tied = copy.deepcopy(model)
        _, block = moe_layers(tied)[0]
        hidden = []
        hook = block.gate.register_forward_hook(lambda _m, _a, logits: hidden.append(logits))
        manifest(tied).with_canary(tied)
        hook.remove()
        # Make the last chosen and the first rejected expert of one token equal but for rounding, then flip them.
        token, bias = 40, block.gate.e_score_correction_bias
        scores = hidden[0][token].sigmoid() + bias
        order = scores.argsort(descending=True)
        chosen, rejected = int(order[2]), int(order[3])
        bias[rejected] += scores[chosen] - scores[rejected] - 2e-7
        sender = manifest(tied).with_canary(tied)
        bias[rejected] += 4e-7
        receiver = WeightReceiver(target)
        receiver.update(stream(tied, sender), sender)
        receiver.check()

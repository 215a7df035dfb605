"""Weights across real processes: trainer and engine are launches of their own, and every planted fault is caught."""

import re

import pytest
import torch
from process_group import free_port, launch
from sync_cases import BIAS, EXPERTS, SQUARE, faults, one_wrong_shard, receiver_dies, sender_ends, update


def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("trainers", "engines", "parallel", "dtype"),
    [
        (1, 1, {}, torch.bfloat16),
        (2, 1, {"ep": 2}, torch.float32),
        (2, 1, {"ep": 1}, torch.bfloat16),
        (1, 2, {"ep": 2}, torch.float32),
        (2, 2, {"ep": 1}, torch.float32),
    ],
    ids=str,
)
def test_every_tensor_arrives(trainers, engines, parallel, dtype, tmp_path):
    found = launch(trainers + engines, update, address(), str(tmp_path), trainers, engines, parallel, dtype)
    certificate = found[0]["certificate"]
    assert certificate.count_written == certificate.count_expected > 30
    assert certificate.sent == certificate.held
    assert all(rank["certificate"] == certificate for rank in found)
    for engine in found[trainers:]:
        assert engine == {"certificate": certificate, "updates": 2, "refusal": None, "differ": []}


NAMED = {
    "swapped experts": f"of other bits than were sent: {EXPERTS}",
    "transposed": f"of other bits than were sent: {SQUARE}",
    "one bit": f"of other bits than were sent: {EXPERTS}",
    "rounded and back": f"of other bits than were sent: {SQUARE}",
    "lost buffers": BIAS,
    "lost bias": f"never arrived: {BIAS}",
    "missing tensor": f"never arrived: {SQUARE}",
    "rounded": SQUARE,
    "stale": "compute something else here",
}


def test_planted_faults_are_named_on_both_sides_and_refused_until_the_next_update():
    sender, engine = launch(2, faults, address())
    assert sender.keys() == engine.keys() == NAMED.keys()
    for fault, named in NAMED.items():
        assert named in sender[fault][0], fault
        assert named in engine[fault][0], fault
        assert (engine[fault][1] or "").startswith("not generating: "), fault
        assert named in (engine[fault][1] or ""), fault
        assert sender[fault][0].startswith("ValueError"), fault


@pytest.mark.parametrize("how", ["dies", "falls silent"])
def test_half_a_stream_is_refused_and_does_not_hang(how, tmp_path):
    dying = (0,) if how == "dies" else ()
    sender, engine, _ = launch(3, sender_ends, address(), address(), how, str(tmp_path), dying=dying)
    count = int(re.match(r"after (\d+) of \d+ tensors: the connection .* is lost", engine["raised"])[1])  # type: ignore
    assert 0 < count < 40
    assert ("Timed out" in engine["raised"]) is (how == "falls silent"), engine["raised"]  # death is known at once
    assert "a weight update broke off" in engine["refusal"]
    assert engine["after"] is None
    assert engine["updates"] == 1
    assert sender is None or "is lost" in sender["raised"]


def test_a_dead_engine_is_known_to_all_processes_of_the_trainer(tmp_path):
    found = launch(3, receiver_dies, address(), str(tmp_path), dying=(2,))
    assert "is lost" in found[0]["raised"]
    assert found[1]["raised"] == found[0]["raised"]


def test_one_wrong_shard_stops_all_processes_of_the_engine(tmp_path):
    found = launch(3, one_wrong_shard, address(), str(tmp_path))
    assert all(f"of other bits than were sent: {EXPERTS}" in rank["raised"] for rank in found)
    assert all(rank["refusal"].startswith("not generating: ") for rank in found[1:])

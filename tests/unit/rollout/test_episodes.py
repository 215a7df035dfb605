"""Samples that talk with an environment: which tokens there are, whose they are, and that nobody waits for others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sample_checks import TIE

from dots_align.config import EnvironmentSection
from dots_align.data.chat import encode_conversation, encode_following, encode_prompt, stop_token_ids
from dots_align.model.router import find_flips, record_routes
from dots_align.model.training import response_scores
from dots_align.rollout.engine import RolloutEngine
from dots_align.rollout.episodes import Episodes
from dots_align.types import GenerationRequest, Message, Prompt, SamplingParams, Trajectory

ENVIRONMENTS = '''
import threading, time
from dots_align.types import Message, Observation

class Asks:
    """Says something else in each turn, three times."""
    def __init__(self, ending="?"):
        self.turn, self.ending = 0, ending
    def reset(self, prompt):
        self.prompt = prompt
    def step(self, response):
        assert response.prompt is self.prompt and response.turns[-1].content == response.text
        self.turn += 1
        return Observation((Message("user", f"{self.turn}{self.ending}"),), 0.5, done=self.turn == 3)

class Begins(Asks):
    def reset(self, prompt):
        return [Message("user", "Begin.")]

class Fails(Asks):
    def step(self, response):
        if self.prompt.answer == "raises": raise KeyError("no such tool")
        if self.prompt.answer == "hangs": time.sleep(100)
        if self.prompt.answer == "wrong": return "text"
        return super().step(response)

class FailsToBegin(Asks):
    def reset(self, prompt):
        raise OSError("no world")

others_are_done = threading.Event()
class Waits(Asks):
    """The first prompt's environment answers when the second's has come to its end."""
    def step(self, response):
        if self.prompt.answer == "first": assert others_are_done.wait(300)
        observation = super().step(response)
        if self.prompt.answer == "second" and observation.done: others_are_done.set()
        return observation
'''
MAX_TOKENS = 80


@pytest.fixture
def talkative(model, tokenizer):
    """The tiny model, made to end its turn after a few tokens."""
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 12
    return model


@pytest.fixture
def play(talkative, tokenizer, tmp_path: Path):
    """Runs 3 samples of each prompt (by its answer) through an environment above; returns them by prompt."""
    (tmp_path / "worlds.py").write_text(ENVIRONMENTS)

    def run(name: str, answers: tuple[str, ...] = ("a", "b"), **keys):
        section = EnvironmentSection.model_validate({"factory": f"{tmp_path / 'worlds.py'}:{name}", **keys})
        prompts = [Prompt([Message("user", f"{answer}: 1+1=?")], answer, answer) for answer in answers]
        sampling = SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=stop_token_ids(tokenizer), seed=3)
        requests = [GenerationRequest(encode_prompt(tokenizer, p.messages), 3, sampling) for p in prompts]
        engine = RolloutEngine(talkative, 4)
        found: list[dict] = [{} for _ in prompts]
        for event in Episodes(engine, tokenizer, section).stream(requests, prompts, return_routes=True):
            assert event.index not in found[event.request]
            found[event.request][event.index] = event.sample
        assert [sorted(of_prompt) for of_prompt in found] == [[0, 1, 2]] * len(prompts)
        assert not engine.has_work
        return requests, [[of_prompt[n] for n in range(3)] for of_prompt in found]

    return run


def test_tokens_are_those_sampled_and_what_the_environment_said(play, talkative, tokenizer) -> None:
    requests, found = play("Asks")
    plain = RolloutEngine(talkative).generate(requests, True)
    num_turns = []
    for samples, alone in zip(found, plain, strict=True):
        for sample, first in zip(samples, alone, strict=True):
            episode = sample.episode
            assert len(sample.response_ids) == len(sample.rollout_logprobs) == len(episode.own) <= MAX_TOKENS
            # The first turn is what the engine samples without an environment, random numbers and all.
            assert sample.response_ids[: len(first.response_ids)] == first.response_ids
            assert sample.rollout_logprobs[: len(first.response_ids)] == first.rollout_logprobs
            # Runs of the policy's tokens and the environment's take turns; decoded, they are what was said.
            pieces: list[tuple[int, list[int]]] = []
            for token, own in zip(sample.response_ids, episode.own, strict=True):
                if not pieces or pieces[-1][0] != own:
                    pieces.append((own, []))
                pieces[-1][1].append(token)
            assert [own for own, _ in pieces] == [1, 0, 1, 0, 1][: len(pieces)]
            said = [encode_following(tokenizer, [turn]) for turn in episode.turns if turn.role == "user"]
            assert [ids for own, ids in pieces if not own] == said
            own_texts = [tokenizer.decode(ids, skip_special_tokens=True) for own, ids in pieces if own]
            assert own_texts == [turn.content for turn in episode.turns if turn.role == "assistant"]
            assert all(ids[-1] == tokenizer.eos_token_id for own, ids in pieces[:-1] if own)
            assert episode.num_turns == len(own_texts)
            assert episode.reward == 0.5 * episode.num_turns
            num_turns.append(episode.num_turns)
    assert num_turns.count(3) > 3
    assert found[0][0].response_ids != found[0][1].response_ids


def test_the_trainer_gives_the_log_probs_and_routes_of_every_turn(play, talkative) -> None:
    requests, found = play("Asks")
    trajectories = [
        Trajectory(r.prompt_ids, s.response_ids, s.rollout_logprobs, 0, 0.0, s.routes, s.episode.own)
        for r, samples in zip(requests, found, strict=True)
        for s in samples
    ]
    compared = 0
    for t in trajectories:
        with torch.no_grad(), record_routes(talkative, with_gaps=True) as recorded:
            scores = response_scores(talkative, [t], [[0]], 1.0)
        assert scores.mask[0].tolist() == t.response_mask
        flips = find_flips(recorded.routes[0], recorded.gaps[0], t.routes)
        assert flips.root_gap < TIE
        same = ~flips.affected[len(t.prompt_ids) - 1 :]
        torch.testing.assert_close(scores.logprobs[0][same], torch.tensor(t.rollout_logprobs)[same], atol=1e-4, rtol=0)
        compared += int(same.sum())
        assert len(t.routes) == (len(t.prompt_ids) + len(t.response_ids) - 1) * 2 * 3  # layers, experts of each
    assert compared > 100
    assert 0 in trajectories[0].response_mask


def test_what_follows_an_answer_is_what_the_template_puts_there(tokenizer) -> None:
    before = [Message("user", "12+30=?"), Message("assistant", "12+30: 42")]
    said = [Message("user", "你好 12"), Message("assistant", "<x>"), Message("user", " and?")]
    whole = encode_prompt(tokenizer, [*before, *said])
    assert encode_conversation(tokenizer, before).input_ids + encode_following(tokenizer, said) == whole
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="puts each turn behind the others"):
        encode_following(tokenizer, said)


def test_turns_and_tokens_have_their_limits(play) -> None:
    _, found = play("Asks", max_turns=2)
    assert {s.episode.num_turns for samples in found for s in samples} <= {1, 2}
    assert {s.finish_reason for samples in found for s in samples if s.episode.num_turns == 2} == {"stop"}
    _, found = play("Asks", arguments={"ending": "!" * MAX_TOKENS})
    for sample in (s for samples in found for s in samples):
        assert (sample.episode.num_turns, sample.finish_reason) == (1, "length")
        assert sample.episode.turns[-1].role == "assistant"


def test_an_environment_may_show_another_prompt(play, tokenizer) -> None:
    requests, found = play("Begins")
    for sample in (s for samples in found for s in samples):
        assert sample.episode.prompt_ids == encode_prompt(tokenizer, [Message("user", "Begin.")])
    assert requests[0].prompt_ids != found[0][0].episode.prompt_ids


def test_an_environment_that_fails_ends_its_own_episode(play, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "dots_align"):
        _, found = play("Fails", ("raises", "hangs", "wrong", "fine"), timeout_seconds=1.0, max_concurrency=2)
    for name, samples in zip(("raises", "hangs", "wrong", "fine"), found, strict=True):
        assert {s.episode.error for s in samples} == {name != "fine"}
        assert name == "fine" or {s.episode.num_turns for s in samples} == {1}
    assert max(s.episode.num_turns for s in found[-1]) == 3
    assert len(caplog.records) == 1
    _, found = play("FailsToBegin", ("a",))
    assert [(s.episode.error, s.episode.num_turns) for s in found[0]] == [(True, 1)] * 3


def test_a_slow_environment_keeps_no_other_sample_waiting(play) -> None:
    """The first prompt's episodes can only go on once the second's have come to their end."""
    _, found = play("Waits", ("first", "second"))
    assert not any(s.episode.error for samples in found for s in samples)
    assert max(s.episode.num_turns for s in found[0]) == 3
    assert replace(found[0][0], episode=None) != replace(found[1][0], episode=None)

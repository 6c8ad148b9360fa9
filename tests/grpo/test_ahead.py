"""Rollouts ahead of the trainer: which weights they are of, that nothing is lost or left behind, exact resume."""

import asyncio
import os
import signal
import threading
import time

import pytest
import torch
from grpo.background import AHEAD, BackgroundTransformers
from grpo.tiny_run import in_child, make_trainer
from random_vlm import save_random_vlm
from transformers import TrainerCallback

from r1v_rl.errors import RecipeError, UserError
from r1v_rl.grpo.ahead import Ahead, RolloutsAhead, packed, unpacked
from r1v_rl.grpo.batch import score
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.state_files import weight_hash
from r1v_rl.tracking.metrics import read_metrics
from r1v_rl.types import Completion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def ahead_trainer(model, folder, *, k=1, callback=None, pause_s=0.0, fails=None, **changes):
    trainer = make_trainer(model, folder, max_staleness=k, **{"save_strategy": "no", **AHEAD, **changes})
    BackgroundTransformers(trainer, pause_s=pause_s, fails=fails)
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rollouts ahead"]


def logged(folder, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


class Watch(TrainerCallback):
    """Keeps the weights of every step, and calls `act(trainer)` at the end of step `at`."""

    def __init__(self, at: int = -1, act=None):
        self.at, self.act = at, act
        self.weights: dict[int, dict] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.act()


# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "stale"), [(1, [0, 1, 1, 1, 1, 1, 1]), (2, [0, 1, 2, 1, 2, 1, 2]), (3, [0, 1, 2, 3, 1, 2, 3])]
)
def test_every_generation_has_its_staleness_and_none_is_begun_for_nothing(k, stale):
    ahead, found, begun = RolloutsAhead(k), [], []
    for generation in range(7):
        for number in ahead.missing(generation, last=6):
            ahead.restore(number, [], {"version": generation, "begun": generation, **packed([])})
            begun.append(number)
        found.append(generation - ahead.take(generation).version)
    assert found == stale and begun == list(range(7))


def test_what_is_staler_than_allowed_is_not_trained_on():
    ahead = RolloutsAhead(2)
    ahead.restore(5, [], {"version": 2, "begun": 2, **packed([])})
    with pytest.raises(RuntimeError, match=r"generation 5 was sampled with the weights of generation 2.*\(2\)"):
        ahead.take(5)


def test_completions_come_back_from_a_checkpoint_as_they_were():
    groups = [
        [Completion([5, 6], [-0.1, -1 / 3], "a \\frac", False, 7), Completion([], [], "", True, 7)],
        [Completion([7], [float("nan")], "b", False, 7), Completion([8], [-2.0], "c", True, 5, is_partial=True)],
        [],
    ]
    again = unpacked(packed(groups))
    assert str(again) == str(groups)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "set `use_vllm: true` and `vllm_mode: server`"),
        ({"use_vllm": True}, "set `use_vllm: true` and `vllm_mode: server`"),
        ({**AHEAD, "vllm_importance_sampling_correction": False}, "set `vllm_importance_sampling_correction: true`"),
        ({**AHEAD, "max_staleness": -1}, "must be 0 or more; received -1"),
    ],
    ids=["generate", "in process", "uncorrected", "negative"],
)
def test_what_cannot_be_ahead_is_refused(tmp_path, keys, message):
    with pytest.raises(RecipeError, match=message):
        GRPOConfig(**{"output_dir": str(tmp_path), "max_staleness": 1, "use_cpu": True, "bf16": False, **keys})


def test_an_engine_that_cannot_be_asked_meanwhile_is_refused(model, tmp_path):
    trainer = ahead_trainer(model, tmp_path, max_steps=1)
    trainer._engine = TransformersEngine(trainer.model, trainer._tokenizer, eos_token_ids=[2], banned_token_ids=[])
    with pytest.raises(RecipeError, match=r"needs rollout servers \(`vllm_mode: server`\).*TransformersEngine"):
        trainer.train()


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_trains_on_the_weights_that_it_says(model, tmp_path):
    """k = 2: versions, metrics, and log-probabilities, which are those of the weights that sampled, not of the policy;
    the loss is corrected by just the difference."""
    watch = Watch()
    trainer = ahead_trainer(model, tmp_path, k=2, callback=watch, max_steps=6, save_rollouts=True)
    trainer.train()
    assert logged(tmp_path, "staleness/max") == logged(tmp_path, "staleness/mean") == [0, 1, 2, 1, 2, 1]
    distances = logged(tmp_path, "sampling/importance_sampling_ratio/distance")
    assert distances[0] < 1e-5 and min(distances[1:]) > 1e-4
    differences = logged(tmp_path, "sampling/sampling_logp_difference/max")
    assert differences[0] < 1e-4 and min(differences[1:]) > 1e-3
    assert len(logged(tmp_path, "rollout/seconds_ahead")) == 6 and trainer._engine.asked == 6
    batch = trainer._buffer
    assert batch.weight_version == 4
    trainer.model.load_state_dict(watch.weights[4])
    with torch.no_grad():
        inputs = trainer._model_inputs(batch, range(8))
        logprobs, _ = score(trainer.model, inputs)
    for row, mask, sampled in zip(logprobs, inputs.token_mask, batch.sampler_logprobs, strict=True):
        assert (row[mask] - sampled).abs().max() <= 1e-4
    assert not background_threads()


def test_measuring_between_generations_changes_nothing(model, tmp_path):
    """Held-out rows are answered with the present weights, which the engine gets when nothing is under way."""
    plain, measured = (
        ahead_trainer(model, tmp_path / name, k=2, max_steps=5, pause_s=0.05, **changes)
        for name, changes in [("plain", {}), ("measured", {"eval_strategy": "steps", "eval_steps": 1})]
    )
    for trainer in (plain, measured):
        trainer.train()
    assert len(logged(tmp_path / "measured", "eval_accuracy")) == 5
    assert logged(tmp_path / "measured", "staleness/max") == [0, 1, 2, 1, 2]
    assert weight_hash(plain.model.state_dict()) == weight_hash(measured.model.state_dict())


def test_a_signal_keeps_what_was_sampled_ahead(model, tmp_path):
    """SIGTERM while a rollout is under way: it is waited for, saved, and trained on by the run that goes on."""
    whole = ahead_trainer(model, tmp_path / "whole", max_steps=5)
    whole.train()
    watch = Watch(1, lambda: os.kill(os.getpid(), signal.SIGTERM))  # seen at the next step's end
    stopped = ahead_trainer(model, tmp_path / "run", max_steps=5, callback=watch, pause_s=0.5)
    stopped.train()
    assert stopped.stopped_by == signal.SIGTERM and stopped.state.global_step == 2 and not background_threads()
    resumed = ahead_trainer(model, tmp_path / "run", max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._engine.asked == 2, "the generation that the checkpoint held was asked for again"
    assert weight_hash(resumed.model.state_dict()) == weight_hash(whole.model.state_dict())


@pytest.mark.parametrize(
    "changes", [{"max_staleness": 1}, {"max_staleness": 2, "num_iterations": 2, "early": True}], ids=str
)
def test_killed_runs_end_with_the_same_weights(model, tmp_path, changes):
    changes = {**AHEAD, **changes}
    assert in_child(model, tmp_path / "whole", changes) == 0
    for step in (2, 3):
        assert in_child(model, tmp_path / "killed", changes, {"step": step, "moment": "after save"}) == -signal.SIGKILL
    assert in_child(model, tmp_path / "killed", changes) == 0
    assert (tmp_path / "killed/final.txt").read_text() == (tmp_path / "whole/final.txt").read_text()


def test_an_exception_gives_up_what_is_under_way(model, tmp_path):
    def fail():
        raise ZeroDivisionError

    trainer = ahead_trainer(model, tmp_path, callback=Watch(1, fail), max_steps=5, pause_s=1000.0)
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert time.monotonic() - started < 60 and not background_threads()
    assert trainer._engine.given_up == 1 and trainer._engine.under_way == 0


def test_what_fails_in_the_background_ends_the_run_and_is_asked_for_again(model, tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    failing = ahead_trainer(model, tmp_path / "run", fails=2, **changes)
    with pytest.raises(UserError, match="no rollout server is left"):
        failing.train()
    assert failing.state.global_step == 2 and not background_threads()
    resumed = ahead_trainer(model, tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert logged(tmp_path / "run", "staleness/max") == [0, 1, 0, 1]


def test_what_only_some_processes_have_is_asked_for_again_by_all(model, tmp_path, monkeypatch):
    trainer = ahead_trainer(model, tmp_path)
    monkeypatch.setattr("r1v_rl.grpo.resume.gather_object", lambda mine: [*mine, [4]])
    state = {n: {"version": 2, "begun": 2, **packed([])} for n in (3, 4)}
    trainer._restore_ahead(trainer._ahead, state)
    assert list(trainer._ahead._begun) == [4]


def test_groups_are_replaced_after_a_resume_among_generations_sampled_ahead(model, tmp_path):
    """Nothing has handed the engine weights by then: what it was to sample before is in the checkpoint."""
    changes = {"k": 2, "dynamic_sampling": 1, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    alike = {"reward": lambda completion_ids, **_: [1.0] * len(completion_ids)}
    ahead_trainer(model, tmp_path, **changes, **alike).train()
    resumed = ahead_trainer(model, tmp_path, **changes, **alike)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(tmp_path, "dynamic_sampling/rounds") == [1.0] * 5


def test_closing_twice_and_beginning_again(model, tmp_path):
    ahead = RolloutsAhead(1)
    ahead.close()

    async def answer():
        await asyncio.sleep(0.05)  # the second waits for its turn
        return []

    for _ in range(2):
        ahead.begin(0, [], answer(), version=0, begun=0)
        ahead.begin(1, [], answer(), version=0, begun=0)
        ahead.wait()
        assert isinstance(ahead.take(0), Ahead) and ahead.take(1).answer.result()[0] == []
        ahead.close()
        ahead.close()
    assert not background_threads()

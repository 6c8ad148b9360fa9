"""GRPO with two real vLLM servers that the run starts: the policy's log-probabilities after every update, prompts
shared out, one server stopped and replaced, nothing reachable without the key, nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grpo.tiny_run import ROWS, make_trainer, token_reward
from random_vlm import save_random_vlm
from transformers import TrainerCallback

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.grpo.batch import model_inputs, score
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.models.parts import part_of
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import encode_prompt, placeholder_ids
from r1v_rl.rollout.server_client import ServerClient
from r1v_rl.rollout.server_side import _tensors
from r1v_rl.tracking.metrics import read_metrics
from r1v_rl.types import Completion

SERVERS = {
    "use_vllm": True, "vllm_mode": "server", "vllm_num_servers": 2, "vllm_kv_cache_memory_bytes": 2**27,
    "vllm_max_model_length": 256, "save_strategy": "no", "rollout_timeout_s": 15.0, "vllm_server_timeout": 500.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainer(model, tmp_path_factory):
    """A run of 12 steps; its servers stay for the tests that follow."""
    trainer = make_trainer(model, tmp_path_factory.mktemp("run"), max_steps=12, **SERVERS)
    trainer.train()
    yield trainer
    trainer.engine.close()


def logged(trainer, name: str) -> list[float]:
    return [line[name] for line in read_metrics(trainer.args.output_dir) if name in line]


def differences(trainer) -> list[float]:
    return logged(trainer, "sampling/sampling_logp_difference/max")


def get(url: str, key: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def counted(engine, *names: str) -> list[float]:
    """Sums of each server's metrics that begin so."""
    texts = [get(f"{url}/metrics", engine._key)[1].decode() for url in engine._urls]
    return [sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(names)) for text in texts]


def prompts_of(trainer):
    examples = examples_from_rows(ROWS[:4], images_without_marks="prepend", answer_required=False)
    return [encode_prompt(trainer.processing_class, example, device="cpu") for example in examples]


def group_pids(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_logprobs_are_the_policys_after_every_update(trainer):
    assert len(differences(trainer)) == 12
    assert max(differences(trainer)) <= 1e-4


def test_two_servers_split_the_work(trainer):
    assert logged(trainer, "rollout/servers") == [2.0] * 12 and set(logged(trainer, "rollout/retries")) == {0.0}
    done = counted(trainer.engine, "vllm:generation_tokens_total{")
    assert min(done) > 0.3 * sum(done)


def test_only_what_trains_is_handed_over_again(trainer):
    """Projector and language model, whole; the files of earlier steps are gone."""
    weights = trainer.engine._weights
    names = {kind: [name for name, _ in _tensors(list(getattr(weights, kind)))] for kind in ("trained", "frozen")}
    assert {part_of(name) for name in names["trained"]} == {"projector", "language_model"}
    assert {part_of(name) for name in names["frozen"]} == {"vision_encoder"}
    kept = sorted(str(path) for path in trainer.engine._folder.path.iterdir())
    assert kept == sorted([*weights.trained, *weights.frozen])


def test_every_completion_carries_what_the_trainer_needs(trainer):
    trainer._engine_version = None
    trainer._sync_engine()
    prompts, sampling = prompts_of(trainer), Sampling(num_generations=3, max_tokens=8)
    groups = trainer.engine.generate(prompts, sampling, seed=5)
    again, other = (trainer.engine.generate(prompts, sampling, seed=seed) for seed in (5, 6))
    tokens = [[c.token_ids for c in group] for group in groups]
    assert tokens == [[c.token_ids for c in group] for group in again]
    assert tokens != [[c.token_ids for c in group] for group in other]
    assert all(len(set(map(tuple, group))) > 1 for group in tokens), "the completions of a group differ"
    for completion in (c for group in groups for c in group):
        assert len(completion.logprobs) == len(completion.token_ids) <= 8
        assert completion.weight_version == trainer.state.global_step == 12
        assert not set(completion.token_ids) & set(placeholder_ids(trainer.model.config))


def test_groups_are_judged_as_they_finish(trainer, monkeypatch):
    """Begun while the longer group is sampled; the same rewards and advantages as at the end."""

    def slow(completion_ids, **_):
        time.sleep(0.05 * len(completion_ids))
        return token_reward(completion_ids)

    slow.per_completion = True
    monkeypatch.setattr(trainer, "reward_stage", RewardStage([slow], trainer.args))
    monkeypatch.setattr(trainer, "_sampling", lambda: Sampling(num_generations=4, max_tokens=[1, 150]))
    rollouts = trainer._sampled(0)
    assert rollouts.early.seconds > 0  # the stage itself has asked for nothing yet
    soon, late = (
        trainer.reward_stage(rollouts.groups, trainer.accelerator, trainer.state, verdicts)
        for verdicts in (rollouts.early, None)
    )
    assert torch.equal(soon.rewards, late.rewards) and torch.equal(soon.advantages, late.advantages)


def test_answers_and_logprobs_of_given_texts_are_those_of_transformers(trainer):
    """The slow twin."""
    eos, banned = sorted(trainer.engine._eos), placeholder_ids(trainer.model.config)
    slow = TransformersEngine(trainer.model, trainer._tokenizer, eos_token_ids=eos, banned_token_ids=banned)
    greedy, prompts = Sampling(num_generations=1, max_tokens=8, temperature=0.0), prompts_of(trainer)
    answers = [[g[0].token_ids for g in engine.generate(prompts, greedy, seed=0)] for engine in (trainer.engine, slow)]
    assert answers[0] == answers[1]
    texts = [[50, 60, 70], [80], [90, 100], [110]]
    fast, twin = (engine.token_logprobs(prompts, texts) for engine in (trainer.engine, slow))
    for found, wanted in zip(fast, twin, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_every_path_needs_the_key(trainer):
    """The development paths too, which vLLM's own check leaves open."""
    url, key = trainer.engine._urls[0], trainer.engine._key
    paths = json.loads(get(f"{url}/openapi.json", key)[1])["paths"]
    assert {"/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/pause", "/v1/models"} <= paths.keys()
    for path, methods in paths.items():
        for method in methods:
            assert get(url + path, None, method.upper())[0] == get(url + path, "wrong", method.upper())[0] == 401, path
    assert get(f"{url}/openapi.json")[0] == get(f"{url}/health")[0] == 401 and get(f"{url}/health", key)[0] == 200


def test_the_key_is_seen_nowhere(trainer):
    key = trainer.engine._key.encode()
    for server in trainer.engine._keeper.servers:
        for pid in group_pids(server.process.pid):
            assert key not in Path(f"/proc/{pid}/cmdline").read_bytes()
    files = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    assert any(path.name == "server-0.log" for path in files)
    assert not [path for path in files if key in path.read_bytes()]


def test_without_the_cache_resets_they_are_not(trainer, model, tmp_path, monkeypatch):
    """Planted: prefixes computed with older weights are used on."""
    monkeypatch.setattr("r1v_rl.rollout.server_client.CACHE_RESETS", ())
    long_question = [{"role": "user", "content": "How many red circles? " * 30}]
    rows = [{**row, "prompt": long_question, "images": []} for row in ROWS]
    stale = make_trainer(model, tmp_path, rows=rows, max_steps=6, **SERVERS)
    stale._engine = trainer.engine
    stale.train()
    monkeypatch.undo()
    assert max(differences(stale)) > 1e-3


class Watch(TrainerCallback):
    """Keeps the weights that every step begins with; the run fails after step `fails`."""

    def __init__(self, fails: int = -1):
        self.fails, self.weights = fails, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.fails:
            raise ZeroDivisionError


def test_ahead_of_the_trainer_logprobs_are_those_of_the_policy_that_sampled(trainer, model, tmp_path):
    ahead, watch = make_trainer(model, tmp_path, max_steps=5, max_staleness=1, **SERVERS), Watch()
    ahead._engine = trainer.engine
    ahead.add_callback(watch)
    ahead.train()
    assert logged(ahead, "staleness/max") == [0, 1, 1, 1, 1] and set(logged(ahead, "rollout/retries")) == {0.0}
    assert differences(ahead)[0] <= 1e-4 and min(differences(ahead)[1:]) > 1e-3
    assert ahead._buffer.weight_version == 3
    ahead.model.load_state_dict(watch.weights[3])
    with torch.no_grad():
        inputs = ahead._model_inputs(ahead._buffer, range(8))
        logprobs, _ = score(ahead.model, inputs)
    for row, mask, sampled in zip(logprobs, inputs.token_mask, ahead._buffer.sampler_logprobs, strict=True):
        assert (row[mask] - sampled).abs().max() <= 1e-4


def test_a_run_that_fails_leaves_the_servers_nothing_to_do(trainer, model, tmp_path):
    """While they sample the next generation, which would take long."""
    long = {"max_completion_length": 150, "generation_kwargs": {"min_tokens": 150}, "num_generations": 8}
    failing = make_trainer(model, tmp_path, max_steps=5, max_staleness=1, **{**SERVERS, **long})
    failing._engine = trainer.engine
    failing.add_callback(Watch(fails=1))
    with pytest.raises(ZeroDivisionError):
        failing.train()
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts ahead"]
    until = time.monotonic() + 60
    while set(running(trainer.engine)) != {0.0} and time.monotonic() < until:
        time.sleep(0.2)
    assert running(trainer.engine) == [0.0, 0.0]


def running(engine) -> list[float]:
    """Completions that each server is at or has waiting."""
    return counted(engine, "vllm:num_requests_running{", "vllm:num_requests_waiting{")


# ---- long tails -----------------------------------------------------------------------------------------------------

SHORT, LONG = 6, 150


def odd_rows_are_long(monkeypatch, engine) -> list[tuple]:
    """What `generate_first` is given, and returns; every completion is as long as its row's number says. One server
    samples all of them, so that the short ones end first."""
    calls, generate_first = [], engine.generate_first
    bans = {"logit_bias": dict.fromkeys([*engine._banned, *engine._eos], -100.0)}

    def with_limits(prompts, sampling, **told):
        limits = [LONG if int(prompt.example.id[-1]) % 2 else SHORT for prompt in prompts]
        groups = generate_first(prompts, replace(sampling, max_tokens=limits, extra=bans), **told)
        calls.append((told["begun"], groups))
        return groups

    monkeypatch.setattr(engine, "generate_first", with_limits)
    monkeypatch.setattr(engine, "_urls", engine._urls[:1])
    return calls


def pieces_of(calls) -> list[dict[tuple[int, ...], list[tuple[int, int, int]]]]:
    """Of every completion after each call, by its tokens: (first token, last + 1, call) of what one call sampled."""
    found = [{(): []}]
    for number, (begun, groups) in enumerate(calls):
        now = {}
        for group, before in zip(groups, begun, strict=True):
            for one, old in zip(group, before or [Completion([], [], "", True)] * len(group), strict=True):
                start, end = len(old.token_ids), len(one.token_ids)
                assert one.token_ids[:start] == old.token_ids and one.logprobs[:start] == old.logprobs
                more = [(start, end, number)] if end > start else []
                now[tuple(one.token_ids)] = found[-1][tuple(old.token_ids)] + more
        found.append({(): [], **now})
    return found[1:]


def test_continued_completions_have_the_logprobs_of_the_policies_that_sampled_them(
    trainer, model, tmp_path, monkeypatch
):
    """Four groups asked for, two taken, the others carried over at most twice."""
    calls, watch, batches = odd_rows_are_long(monkeypatch, trainer.engine), Watch(), []
    keys = {**SERVERS, "max_completion_length": LONG, "over_provision": 1.0, "partial_rollouts": 2}
    tail = make_trainer(model, tmp_path, max_steps=6, **keys)
    tail._engine, rollout = trainer.engine, tail._rollout
    tail.add_callback(watch)
    monkeypatch.setattr(tail, "_rollout", lambda generation: batches.append(rollout(generation)) or batches[-1])
    tail.train()
    several, off = 0, []
    for step, (batch, pieces) in enumerate(zip(batches, pieces_of(calls), strict=True)):
        assert [len(ids) for ids in batch.completion_ids] == [
            LONG if row % 2 else SHORT for row in batch.rows for _ in range(4)
        ]
        rows = [pieces[tuple(ids)] for ids in batch.completion_ids]
        versions = {version for row in rows for *_, version in row}
        assert batch.weight_version == min(versions) >= step - 2 and logged(tail, "staleness/max")[step] <= 2
        several += sum(len(row) > 1 for row in rows)
        for version in versions:
            tail.model.load_state_dict(watch.weights[version])
            with torch.no_grad():
                inputs = tail._model_inputs(batch, range(8))
                logprobs, _ = score(tail.model, inputs)
            for row, mask, all_of_it, sampled in zip(
                rows, inputs.token_mask, logprobs, batch.sampler_logprobs, strict=True
            ):
                for start, end, of in row:
                    difference = (all_of_it[mask] - sampled)[start:end].abs().max()
                    off += [] if of == version else [difference]
                    assert of != version or difference <= 1e-4
    assert several and min(off) > 1e-3, "no completion is of several policies, or they are the same"
    assert max(logged(tail, "rollout/resumed")) > 0 and set(logged(tail, "rollout/dropped")[:-1]) == {0.0}
    assert running(trainer.engine) == [0.0]


@pytest.mark.parametrize("way", ["told", "closed"])
def test_what_is_not_needed_is_gone_at_the_servers(trainer, monkeypatch, way):
    """Told to stop they return what there is; where they are not, the closed connections do it."""

    def tokens_done() -> float:
        return sum(counted(trainer.engine, "vllm:generation_tokens_total{"))

    odd_rows_are_long(monkeypatch, trainer.engine)
    trainer._engine_version = None
    trainer._sync_engine()
    if way == "closed":
        monkeypatch.setattr("r1v_rl.rollout.dispatch._STOP_S", 0.0)
    prompts, sampling, before = prompts_of(trainer), Sampling(32, LONG), tokens_done()
    groups = trainer.engine.generate_first(
        prompts, sampling, seed=3, begun=[[]] * 4, enough=lambda whole: {0, 2} <= whole
    )
    left = running(trainer.engine)  # at once
    assert [[len(c.token_ids) for c in group] for group in (groups[0], groups[2])] == [[SHORT] * 32] * 2
    if way == "told":
        assert left == [0.0]
        assert all(c.is_partial and len(c.logprobs) == len(c.token_ids) < LONG for c in groups[1] + groups[3])
    else:
        assert groups[1] == groups[3] == []
        until = time.monotonic() + 60
        while set(running(trainer.engine)) != {0.0} and time.monotonic() < until:
            time.sleep(0.05)
    assert running(trainer.engine) == [0.0]
    assert tokens_done() - before < 64 * LONG, "they were sampled to their end"


def test_a_stopped_server_is_left_out_and_replaced(trainer, monkeypatch):
    """SIGSTOP to all of its processes amid a rollout: the other one answers what it had in hand; then it is killed,
    started again, and holds the policy's weights, which are not those of its folder, before it is asked."""
    trainer._engine_version = None
    trainer._sync_engine()
    server, other = trainer.engine._keeper.servers
    process = server.process
    stop_amid(monkeypatch, server)
    long = Sampling(num_generations=32, max_tokens=150, extra={"min_tokens": 150})
    groups = trainer.engine.generate(prompts_of(trainer), long, seed=3)
    monkeypatch.undo()
    assert [len(group) for group in groups] == [32] * 4
    assert trainer.engine.metrics["rollout/servers"] == 1
    assert trainer.engine.metrics["rollout/retries"] in (1, 2)  # of its two prompts one may have come back
    until = time.monotonic() + 400
    while not (server.process is not process and server.holds == other.holds) and time.monotonic() < until:
        time.sleep(0.5)
    assert server.holds == other.holds == trainer.engine._weights.version and server.process.pid != process.pid
    assert process.poll() == -signal.SIGKILL and not group_pids(process.pid)
    os.killpg(other.process.pid, signal.SIGSTOP)  # so that the new one answers everything
    try:
        batch = trainer._rollout(20)
    finally:
        os.killpg(other.process.pid, signal.SIGCONT)
    assert_parity(trainer, batch)


def stop_amid(monkeypatch, server) -> None:
    """Stop the server a moment after its first request left, from the thread that would read its reply."""
    ask = ServerClient.generate

    async def stopping(client, body):
        if client.url == server.url:
            pid = server.process.pid
            asyncio.get_running_loop().call_later(0.05, lambda: os.killpg(pid, signal.SIGSTOP))
        return await ask(client, body)

    monkeypatch.setattr(ServerClient, "generate", stopping)


def assert_parity(trainer, batch) -> None:
    with torch.no_grad():
        inputs = model_inputs(batch, range(8), pad_token_id=0, device="cpu", share_prefix=False)
        logprobs, _ = score(trainer.model, inputs)
    for row, mask, sampled in zip(logprobs, inputs.token_mask, batch.sampler_logprobs, strict=True):
        assert (row[mask] - sampled).abs().max() <= 1e-4


def test_nothing_is_left_when_the_engine_is_closed(trainer):
    """The last test of the file that uses the servers."""
    engine = trainer.engine
    leaders = [server.process.pid for server in engine._keeper.servers]
    folder, urls = engine._folder.path, engine._urls
    engine.close()
    assert not [pid for leader in leaders for pid in group_pids(leader)]
    assert not folder.exists()
    for url in urls:
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5)


def test_a_server_ends_with_a_run_that_is_killed(tmp_path):
    """SIGKILL leaves no chance to say goodbye."""
    source = (
        "import time; from pathlib import Path; from r1v_rl.rollout.vllm_server import start_server\n"
        f"log = Path({str(tmp_path)!r}, 'log')\n"
        "print(start_server('m', ['m'], {}, port=1, key='k', takes_weights=True, log=log).pid, flush=True)\n"
        "time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    leader = int(run.stdout.readline())
    assert group_pids(leader)
    run.kill()
    run.wait()
    until = time.monotonic() + 10
    while group_pids(leader) and time.monotonic() < until:
        time.sleep(0.1)
    assert not group_pids(leader)

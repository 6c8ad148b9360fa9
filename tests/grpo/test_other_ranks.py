"""Checkpoints of two ranks resumed by one, and of one by two: the weights of the run that was not interrupted."""

import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from grpo.engine_run import two_processes
from grpo.other_ranks_run import on_two, run
from grpo.tiny_run import make_trainer as grpo
from kill_run import RECIPES
from random_vlm import save_random_vlm
from ranks import Ranks, launch
from safetensors.torch import load_file
from sft.tiny_sft import make_trainer as sft

from r1v_rl import cli
from r1v_rl.errors import CheckpointError
from r1v_rl.grpo.ahead import packed, shared_ahead, unpacked
from r1v_rl.grpo.sampler import PromptSampler
from r1v_rl.grpo.tail import shared_tail
from r1v_rl.training.other_ranks import refusal
from r1v_rl.training.shard_states import shared_optimizer_state
from r1v_rl.types import Completion

JOBS = {"ddp": ["plain", "inside", "sft"], "fsdp2": ["inside", "lora"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> Path:
    """Every job by one rank, to its end."""
    folder = tmp_path_factory.mktemp("alone")
    for job in sorted(set().union(*JOBS.values())):
        run(None, model, folder, job)
    return folder


@pytest.mark.parametrize("engine", JOBS)
def test_another_number_of_ranks_ends_with_the_same_weights(engine, model, alone, tmp_path, caplog):
    two_processes(engine, on_two, model, tmp_path, JOBS[engine], alone)
    for job in JOBS[engine]:
        run(None, model, tmp_path / "one", job, tmp_path)
        wanted = load_file(next((alone / job).glob("*.safetensors")))
        for way in ("resumed", "one"):
            found = load_file(next((tmp_path / way / job).glob("*.safetensors")))
            assert set(found) == set(wanted)
            for name, tensor in found.items():
                assert (tensor - wanted[name]).abs().max() <= 1e-5, f"{way}, {job}: {name}"
    said = [record.message for record in caplog.records if "was written by" in record.message]
    assert len(said) == len(JOBS[engine]), "one line for every resume"
    assert said[0].startswith("checkpoint-3 was written by 2 ranks, this run has 1: weights, optimizer, schedule")
    first, second = ((tmp_path / f"seed-{rank}.txt").read_text() for rank in (0, 1))
    assert first != second, "ranks drop out alike"
    first, second = ((tmp_path / f"refused-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert "was written by 1 rank and this run has 2, which must share the same rows" in first
    assert "num_processes, are 8 as they were (8 x 1 x 1) and not 16 (8 x 1 x 2)" in first


def test_a_command_on_another_number_of_ranks(model, tmp_path):
    """Two ranks are killed; one is told which keys to change, goes on with them, and two are told in their turn."""
    killed = _launch("ddp", model, tmp_path, per_device_train_batch_size=8)
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill([0, 1])
    assert None not in killed.wait(60)
    alone = _launch(None, model, tmp_path, per_device_train_batch_size=8)
    assert alone.wait(240) == [2], alone.said()
    assert "gradient_accumulation_steps x num_processes, are 16 as they were (8 x 1 x 2) and not 8" in alone.said()[0]
    assert "Traceback" not in alone.said()[0]
    alone = _launch(None, model, tmp_path, per_device_train_batch_size=16)
    assert alone.wait(240) == [0], alone.said()
    assert alone.said()[0].count("was written by 2 ranks, this run has 1") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
    both = _launch("ddp", model, tmp_path, per_device_train_batch_size=16)
    assert both.wait(240) == [2, 2], both.said()
    deadline = time.monotonic() + 10
    assert all("are 16 as they were (16 x 1 x 1) and not 32 (16 x 1 x 2)" in said for said in both.said())
    while both.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not both.left(), "a process stays behind"


def _launch(engine: str | None, model: Path, folder: Path, **keys) -> Ranks:
    output = folder / "out"
    keys = {**RECIPES["grpo"], "max_steps": 4, "model_name_or_path": str(model), "output_dir": str(output), **keys}
    (folder / "reward.py").write_text(
        "def length(completion_ids, **kwargs):\n    return [len(i) for i in completion_ids]"
    )
    keys["reward_funcs"] = [f"{folder}/reward.py:length"]
    keys["resume_from_checkpoint"] = "true" if any(output.glob("checkpoint-*")) else "false"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return launch(engine, folder / str(time.monotonic()), cli.main, ["grpo", "--config", str(folder / "recipe.yaml")])


# ---- the parts ------------------------------------------------------------------------------------------------------

ONE_STEP = {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
ROWS = {"the rows": ("per_device_train_batch_size", "num_processes")}


def fingerprint(processes: int, engine: str | None = None, rows: int = 4, seed: int = 1) -> dict:
    return {"num_processes": processes, "engine": engine, "per_device_train_batch_size": rows, "seed": seed}


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (fingerprint(2), fingerprint(1, rows=8), ""),
        (fingerprint(2, "fsdp2"), fingerprint(1, rows=8), ""),
        (fingerprint(1, rows=8), fingerprint(2, "fsdp2"), ""),
        (fingerprint(2), fingerprint(1), "are 8 as they were (4 x 2) and not 4 (4 x 1)"),
        (
            fingerprint(2),
            fingerprint(1, rows=8, seed=2),
            "another run, and cannot be continued exactly: seed was 1, is 2",
        ),
        (fingerprint(2), fingerprint(2, rows=8), "per_device_train_batch_size was 4, is 8"),
        (fingerprint(2), fingerprint(2, "fsdp2"), "engine was None, is 'fsdp2'"),
        (fingerprint(2), fingerprint(1, "zero2"), "num_processes was 2, is 1; engine was None, is 'zero2'"),
        (fingerprint(2, "zero3"), fingerprint(1, rows=8), "written by 2 ranks under zero3"),
        (fingerprint(2, "zero2"), fingerprint(4, "zero2", rows=2), "this run has 4: launch with `--num_processes 2`"),
    ],
)
def test_what_another_number_of_ranks_needs(then, now, said):
    reason = refusal(then, now, ROWS)
    assert said in reason and bool(said) == bool(reason), reason


@pytest.mark.parametrize(
    ("make", "keys", "ranks", "then", "said"),
    [
        (grpo, {}, 2, {"per_device_train_batch_size": 4}, ""),
        (grpo, {"steps_per_generation": 2}, 2, {"per_device_train_batch_size": 4}, ""),
        (grpo, {"steps_per_generation": 2}, 4, {"per_device_train_batch_size": 2}, r"on 4 ranks .*\(2 x 1 rows of gr"),
        (grpo, {"loss_type": "bnpo"}, 2, {"per_device_train_batch_size": 4}, "weigh tokens by it"),
        (grpo, {"loss_type": "bnpo", "gradient_accumulation_steps": 2}, 2, ONE_STEP, ""),
        (grpo, {"top_entropy_quantile": 0.5, "gradient_accumulation_steps": 2}, 2, ONE_STEP, "top_entropy_quantile"),
        (sft, {}, 2, {"per_device_train_batch_size": 1}, ""),
        (sft, {"gradient_accumulation_steps": 2}, 2, {"gradient_accumulation_steps": 1}, ""),
        (sft, {"gradient_accumulation_steps": 2, "dataloader_drop_last": True}, 2, ONE_STEP, "dataloader_drop_last"),
        (sft, {"average_tokens_across_devices": False}, 2, {"per_device_train_batch_size": 1}, "its own mean"),
    ],
)
def test_what_depends_on_the_number_of_ranks_is_refused(model, tmp_path, make, keys, ranks, then, said):
    trainer = make(model, tmp_path, **keys)
    reason = trainer._refusal({**trainer._fingerprint(), "num_processes": ranks, **then})
    assert bool(reason) == bool(said) and re.search(said, reason), reason


def test_an_update_has_the_same_prompts_on_any_number_of_ranks():
    keys = {"prompts_per_generation": 8, "micro_steps_per_generation": 4, "shuffle": True, "seed": 0}
    sampler = PromptSampler(20, blocks=2, **keys)
    whole = sampler.prompts(3, 0, 1)
    for world in (2, 4):
        shares = [sampler.prompts(3, rank, world) for rank in range(world)]
        for update in range(2):
            share = 4 // world
            rows = [row for found in shares for row in found[update * share : (update + 1) * share]]
            assert rows == whole[4 * update : 4 * update + 4]
    assert sampler.places(1, 8) == [1], "blocks of four prompts cannot be shared by eight"


def test_rollouts_ahead_change_hands_by_whole_groups():
    sampler = PromptSampler(8, prompts_per_generation=8, micro_steps_per_generation=2, shuffle=False, seed=0, blocks=2)
    places = {world: [sampler.places(rank, world) for rank in range(world)] for world in (1, 2, 4)}
    groups = [[Completion([p, i], [-0.5, -0.25], str(p), i > 0, 7) for i in range(2)] for p in range(8)]
    states = [
        {3: {"version": 7, "begun": 2, **packed([groups[p] for p in mine])}, **({4: {}} if rank == 0 else {})}
        for rank, mine in enumerate(places[2])
    ]
    for world in (1, 4):
        for mine in places[world]:
            found = shared_ahead(states, places[2], mine)
            assert list(found) == [3], "one that not all ranks have is asked for again"
            assert found[3]["begun"] == 2 and str(unpacked(found[3])) == str([groups[p] for p in mine])


def test_groups_that_wait_to_be_continued_are_dealt_out():
    """Some partial, some not begun; every one goes to one rank, with its age."""
    groups = [[Completion([p], [-0.5], str(p), True, 5, is_partial=True)] * 2 if p % 2 else [] for p in range(5)]
    cut = [slice(0, 3), slice(3, 5)]
    states = [{"rows": list(range(5))[s], "carried": [1, 2, 1, 1, 2][s], **packed(groups[s])} for s in cut]
    for world in (1, 3):
        shares = [shared_tail(states, rank, world) for rank in range(world)]
        assert sorted(row for share in shares for row in share["rows"]) == list(range(5))
        for share in shares:
            assert str(unpacked(share)) == str([groups[row] for row in share["rows"]])
            assert share["carried"] == [[1, 2, 1, 1, 2][row] for row in share["rows"]]


def test_shards_that_make_no_whole_weight_are_refused():
    optimizer = torch.optim.AdamW([torch.zeros(4, 2, requires_grad=True)])
    states = [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": ("shard", torch.full((2, 2), i))}}} for i in (1, 2)]
    assert shared_optimizer_state(optimizer, states)["state"][0]["exp_avg"][:, 0].tolist() == [1, 1, 2, 2]
    with pytest.raises(CheckpointError, match=r"4 shards.*\[8, 2\] of a weight of \[4, 2\]: resume on the number"):
        shared_optimizer_state(optimizer, states * 2)

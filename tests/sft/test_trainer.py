"""What trains and what does not, the features cache, and runs that were killed."""

import os
import signal

import pytest
import torch
from random_vlm import random_vlm, save_random_vlm
from sft.tiny_sft import ROWS, in_child, make_trainer

from r1v_rl.errors import CheckpointError, RecipeError
from r1v_rl.models.parts import PARTS, part_module, part_of


def trained(tmp_path, **changes):
    model, processor = random_vlm()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(model, tmp_path, processor=processor, **{"save_strategy": "no", **changes})
    trainer.train()
    moved = {part_of(n) for n, w in trainer.model.state_dict().items() if n in before and not torch.equal(w, before[n])}
    return trainer, moved


@pytest.mark.parametrize("trainable", [["projector"], ["language_model"], ["vision_encoder", "projector"], list(PARTS)])
def test_only_the_named_parts_move(tmp_path, trainable):
    trainer, moved = trained(tmp_path, trainable=trainable, max_steps=2)
    assert moved == set(trainable)
    assert all(torch.isfinite(w).all() for w in trainer.model.state_dict().values())


def test_a_frozen_encoder_runs_once_a_step_without_a_graph(tmp_path):
    model, processor = random_vlm()
    outputs = []
    trainer = make_trainer(model, tmp_path, processor=processor, save_strategy="no", gradient_checkpointing=True)
    part_module(model, "vision_encoder").register_forward_hook(lambda m, a, out: outputs.append(out.last_hidden_state))
    trainer.train()
    assert len(outputs) == 6 and not any(out.requires_grad for out in outputs)


def test_every_part_has_its_learning_rate(tmp_path):
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 2e-3, "vision_learning_rate": 5e-4}
    model, processor = random_vlm()
    trainer = make_trainer(model, tmp_path, processor=processor, trainable=list(PARTS), weight_decay=0.1, **rates)
    groups = trainer.create_optimizer().param_groups
    found = {(g["part"], g["lr"]) for g in groups}
    assert found == {("language_model", 1e-3), ("projector", 2e-3), ("vision_encoder", 5e-4)}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}


# ---- kept features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_kept_features_train_the_same_weights(tmp_path, packing):
    changes = {"max_steps": 8, "packing": packing}
    fresh, _ = trained(tmp_path, **changes)
    kept, _ = trained(tmp_path, vision_features="cache", **changes)
    for name, weight in fresh.model.state_dict().items():
        assert torch.allclose(weight, kept.model.state_dict()[name], atol=1e-6), name


def test_every_picture_goes_through_the_encoder_once_in_a_run(tmp_path):
    trainer, _ = trained(tmp_path, vision_features="cache", max_steps=10)
    rows = trainer._train_rows
    assert trainer.state.epoch >= 3
    assert trainer._features.tower_tiles == sum(rows.num_tiles(i) for i in range(len(rows.sizes)))


def test_a_cache_that_is_full_keeps_what_it_has(tmp_path):
    """Half of the pictures fit: they are seen once, the others at each use, and the weights are the same."""
    fresh, _ = trained(tmp_path, max_steps=12)
    one_tile = 17 * 32 * 4
    kept, _ = trained(tmp_path, vision_features="cache", max_steps=12, vision_cache_memory_bytes=9 * one_tile)
    rows = kept._train_rows
    tiles = sum(rows.num_tiles(i) for i in range(len(rows.sizes)))
    epochs = kept.state.epoch
    assert epochs >= 3 and tiles < kept._features.tower_tiles < tiles * epochs
    for name, weight in fresh.model.state_dict().items():
        assert torch.allclose(weight, kept.model.state_dict()[name], atol=1e-6), name


def test_a_cache_for_an_encoder_that_trains_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"vision_features: cache.*take it out of `trainable`"):
        trained(tmp_path, vision_features="cache", trainable=["vision_encoder", "projector"])


# ---- checkpoints ----------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "packed": {},
    "padded, accumulation": {"packing": False, "gradient_accumulation_steps": 2},
    "kept features, square root": {
        "vision_features": "cache",
        "loss_weighting": "sqrt_length",
        "trainable": ["projector"],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_killed_run_ends_with_the_same_bits(model, tmp_path, name):
    """Killed after a save inside the first epoch, before one in the second, after the last but one."""
    changes = CONFIGURATIONS[name]
    assert in_child(model, tmp_path / "whole", changes) == 0
    for step, moment in ((1, "after save"), (3, "before save"), (4, "after save"), (5, "after save")):
        kill = {"step": step, "moment": moment}
        assert in_child(model, tmp_path / "killed", changes, kill) == -signal.SIGKILL
    assert in_child(model, tmp_path / "killed", changes) == 0
    final = [(tmp_path / run / "final.txt").read_text() for run in ("whole", "killed")]
    assert final[0] == final[1]


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_killed_inside_a_save_at_every_write(model, tmp_path, stage):
    """Every third write of it, and every one with R1V_LONG."""
    changes = {"max_steps": 3, "trainable": ["projector"] if stage == "align" else ["projector", "language_model"]}
    assert in_child(model, tmp_path / "whole", changes) == 0
    wanted = (tmp_path / "whole" / "final.txt").read_text()
    apart = 1 if os.environ.get("R1V_LONG") else 3
    for nth in range(0, 100, apart):
        folder = tmp_path / f"killed{nth}"
        code = in_child(model, folder, changes, {"step": 2, "moment": "inside save", "nth": nth})
        if code == 0:
            break  # the save opens fewer files than that
        assert code == -signal.SIGKILL
        assert in_child(model, folder, changes) == 0
        assert (folder / "final.txt").read_text() == wanted, f"killed at write {nth} of the save"
    assert nth > 10, f"only {nth} writes seen: the hook misses the save"


def test_a_checkpoint_of_other_rows_or_settings_is_refused(model, tmp_path):
    make_trainer(model, tmp_path, max_steps=1).train()
    with pytest.raises(CheckpointError, match="data was"):
        make_trainer(model, tmp_path, rows=ROWS[:8]).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="loss_weighting was 'token', is 'sqrt_length'"):
        make_trainer(model, tmp_path, loss_weighting="sqrt_length").train(resume_from_checkpoint=True)


def test_held_out_rows_are_evaluated(model, tmp_path):
    trainer = make_trainer(
        model, tmp_path, eval_dataset=ROWS[:4], eval_strategy="steps", eval_steps=3, save_strategy="no", max_steps=3
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 1 and logged[0]["eval_loss"] > 0 and 0 <= logged[0]["eval_mean_token_accuracy"] <= 1


def test_a_lora_adapter_trains_alone(model, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(model, tmp_path, peft_config=config, save_strategy="no", max_steps=2)
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= names and all("lora_" in n for n in names)
    with pytest.raises(RecipeError, match="exclude each other"):
        make_trainer(model, tmp_path, peft_config=config, trainable=["projector"])

"""Nothing for nothing: completions that move nothing are not run, and pictures are seen once; the numbers stay."""

import pytest
import torch
from grpo.tiny_run import ROWS, SETTINGS, make_trainer
from random_vlm import picture, random_vlm, save_random_vlm

from r1v_rl.errors import RecipeError
from r1v_rl.grpo.batch import GenerationBatch
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.grpo.update import rows_to_run, spread, within_budget
from r1v_rl.models import logprobs
from r1v_rl.models.parts import part_module
from r1v_rl.models.vision import run_without_graph_where_frozen
from r1v_rl.models.vision_features import VisionFeatures
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.state_files import weight_hash
from r1v_rl.types import Example

SAVELESS = {"save_strategy": "no", "max_steps": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def some_equal(completion_ids, **_) -> list[float]:
    """Groups of four: the first of every two has equal rewards."""
    return [0.3 if i // 4 % 2 == 0 else sum(ids) % 7 / 7 for i, ids in enumerate(completion_ids)]


def trainer_with(model, folder, reward, **changes) -> GRPOTrainer:
    args = {**SETTINGS, **SAVELESS, "output_dir": str(folder), **changes}
    return GRPOTrainer(model=str(model), reward_funcs=[reward], args=GRPOConfig(**args), train_dataset=ROWS)


def logged(trainer) -> list[dict]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


# ---- completions that move nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_skipping_changes_neither_loss_nor_gradient(model, tmp_path, loss_type, share_prefix):
    """Two updates on a rollout, so that ratios leave 1; half the groups have equal rewards."""
    runs = []
    for skip in (True, False):
        trainer = trainer_with(
            model, tmp_path / str(skip), some_equal, loss_type=loss_type, share_prefix=share_prefix, num_iterations=2,
            skip_zero_advantage=skip,
        )  # fmt: skip
        runs.append(logged(trainer))
    for skipped, full in zip(*runs, strict=True):
        assert skipped["skipped_completions"] >= 0.5 and full["skipped_completions"] == 0.0
        for key in {"loss", "grad_norm", "reward", "frac_reward_zero_std"} & full.keys():
            assert skipped[key] == pytest.approx(full[key], rel=1e-4, abs=1e-7), key


def test_truncated_completions_that_do_not_count_are_not_run(model, tmp_path):
    runs = []
    for skip in (True, False):
        changes = {"mask_truncated_completions": True, "skip_zero_advantage": skip}
        runs.append(logged(make_trainer(model, tmp_path / str(skip), **SAVELESS, **changes)))
    assert any(row["skipped_completions"] > 0 for row in runs[0])
    for skipped, full in zip(*runs, strict=True):
        assert (skipped["loss"], skipped["grad_norm"]) == pytest.approx((full["loss"], full["grad_norm"]), rel=1e-4)


def test_an_update_that_nothing_moves_takes_no_forward_and_changes_nothing(model, tmp_path):
    trainer = trainer_with(model, tmp_path, lambda completion_ids, **_: [0.7] * len(completion_ids))
    before = weight_hash(trainer.model.state_dict())
    calls = []
    trainer.model.model.language_model.register_forward_hook(lambda *_: calls.append(trainer.model.training))
    rows = logged(trainer)
    assert not any(calls), "only generate, in eval mode, runs the model"
    assert [(row["loss"], row["grad_norm"], row["skipped_completions"]) for row in rows] == [(0.0, 0.0, 1.0)] * 3
    assert weight_hash(trainer.model.state_dict()) == before
    assert all(row["entropy"] is None for row in rows if "entropy" in row)


@pytest.mark.parametrize("changes", [{"beta": 0.04}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}], ids=str)
def test_what_needs_every_completion_gets_it(model, tmp_path, changes):
    trainer = trainer_with(model, tmp_path, some_equal, **changes)
    assert all(row["skipped_completions"] == 0.0 for row in logged(trainer))


def test_a_distributed_run_keeps_the_shortest_row(tmp_path):
    batch = batch_of([9, 3], [2, 4, 6, 5])
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, bf16=False)
    assert rows_to_run(batch, range(4), args, at_least_one=True) == [3]
    assert rows_to_run(batch, range(4), args, at_least_one=False) == []
    batch.advantages[2] = -1.0
    assert rows_to_run(batch, range(4), args, at_least_one=True) == [2]


def test_spread_fills_the_places_and_keeps_gradients():
    values = torch.ones(2, 3, requires_grad=True)
    rest = torch.full((4, 5), -2.0)
    filled = spread(values, torch.tensor([2, 0]), rest)
    assert filled.tolist() == [[1, 1, 1, 0, 0], [-2] * 5, [1, 1, 1, 0, 0], [-2] * 5]
    filled.sum().backward()
    assert values.grad.tolist() == [[1.0] * 3] * 2 and rest[0, 0] == -2.0


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
@pytest.mark.parametrize(("entropy_coef", "once"), [(0.0, True), (0.1, False)])
def test_the_logits_are_computed_once(model, tmp_path, monkeypatch, trainable, entropy_coef, once):
    """Unless the loss has an entropy, whose gradient needs them again."""
    called, real = [], logprobs._HeadOnce.apply
    monkeypatch.setattr(logprobs._HeadOnce, "apply", lambda *args: (called.append(1), real(*args))[1])
    trainer_with(model, tmp_path, some_equal, trainable=trainable, entropy_coef=entropy_coef, max_steps=1).train()
    assert bool(called) == once


# ---- a token budget --------------------------------------------------------------------------------------------------


def batch_of(prompts: list[int], completions: list[int]) -> GenerationBatch:
    return GenerationBatch(
        prompts=[EncodedPrompt(Example("", [], (), None), "", [], [], [1] * n, {}) for n in prompts],
        completion_ids=[[5] * n for n in completions],
        counts=[True] * len(completions),
        advantages=torch.zeros(len(completions)),
        process_tokens=float(sum(completions)),
        weight_version=0,
    )


@pytest.mark.parametrize(
    ("budget", "share_prefix", "passes"),
    [
        (None, True, [[0, 1, 2, 3]]),
        (26, True, [[0, 1, 2], [3]]),  # 9 + 2 + 4 + 3 + 6 = 24, and 5 more
        (15, True, [[0, 1], [2, 3]]),
        (1, True, [[0], [1], [2], [3]]),
        (27, False, [[0, 1], [2, 3]]),  # 2 x (9 + 4), 2 x (3 + 6)
    ],
)
def test_passes_keep_within_the_budget(budget, share_prefix, passes):
    batch = batch_of([9, 3], [2, 4, 6, 5])
    assert within_budget(batch, range(4), budget, share_prefix=share_prefix) == passes


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo", "beta": 0.1, "num_iterations": 2},
        {"importance_sampling_level": "sequence", "num_iterations": 2, "entropy_coef": 0.01},
    ],
    ids=str,
)
def test_several_passes_are_one_update(model, tmp_path, changes, share_prefix):
    """Loss, gradient norm and metrics of three steps, in passes of one to three completions, and all at once."""
    runs, forwards = [], []
    for budget in (60, None):
        trainer = make_trainer(
            model,
            tmp_path / str(budget),
            max_tokens_per_forward=budget,
            share_prefix=share_prefix,
            **SAVELESS,
            **changes,
        )
        calls: list[int] = []
        trainer.model.model.register_forward_hook(
            lambda m, a, out, calls=calls: calls.append(1) if m.training else None
        )
        runs.append(logged(trainer))
        forwards.append(len(calls))
    assert forwards[0] > 2 * forwards[1]
    for split, at_once in zip(*runs, strict=True):
        for key in {"loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean"} & at_once.keys():
            assert split[key] == pytest.approx(at_once[key], rel=1e-4, abs=1e-6), key


def test_a_quantile_over_all_tokens_cannot_be_split(model, tmp_path):
    with pytest.raises(RecipeError, match="`top_entropy_quantile` below 1 compares all tokens"):
        make_trainer(model, tmp_path, max_tokens_per_forward=50, top_entropy_quantile=0.5)


# ---- pictures ------------------------------------------------------------------------------------------------------


def tiles_seen(trainer) -> list[int]:
    """Fills with the tiles of each call that computes, in training mode of the policy (generate sees them too)."""
    seen: list[int] = []
    for each in (trainer.model, trainer.ref_model):
        if each is not None:
            part_module(each, "vision_encoder").register_forward_pre_hook(
                lambda m, a, kw: seen.append(len(kw["pixel_values"])) if kw["pixel_values"].ndim == 4 else None,
                with_kwargs=True,
            )
    return seen


def without_generate(trainer, seen: list[int]):
    """Leave out what the rollout engine itself sees."""
    engine = trainer.engine
    generate = engine.generate

    def counted(*args, **kwargs):
        before = len(seen)
        found = generate(*args, **kwargs)
        del seen[before:]
        return found

    engine.generate = counted


def test_pictures_are_seen_once_a_rollout_by_all_passes(model, tmp_path):
    """Policy, old policy and reference; two updates; one generation of 8 prompts: 2 x (1 + 0 + (3 + 1) + 3) tiles."""
    trainer = make_trainer(
        model, tmp_path, beta=0.1, num_iterations=2, steps_per_generation=4, save_strategy="no", max_steps=8
    )
    seen = tiles_seen(trainer)
    without_generate(trainer, seen)
    trainer.train()
    expected = sum(len(trainer._encode([e])[0].vision_inputs.get("pixel_values", ())) for e in trainer.train_examples)
    assert sum(seen) == expected


def test_the_cache_spares_the_tower_and_changes_no_bit(model, tmp_path):
    hashes, tiles = {}, {}
    for mode in ("recompute", "cache"):
        trainer = make_trainer(model, tmp_path / mode, vision_features=mode, save_strategy="no", max_steps=9)
        trainer.train()
        hashes[mode], tiles[mode] = weight_hash(trainer.model.state_dict()), trainer._vision.tower_tiles
    assert hashes["cache"] == hashes["recompute"]
    assert tiles["recompute"] > 2 * tiles["cache"] > 0, "two prompts a step, eight rows: more than two epochs"


def test_seen_pictures_give_what_pixels_give(model, tmp_path):
    """The same run with the tower inside every forward."""
    runs = []
    for ahead in (True, False):
        trainer = make_trainer(model, tmp_path / str(ahead), **SAVELESS)
        assert trainer._vision is not None
        if not ahead:
            trainer._vision = None
        runs.append(logged(trainer))
    for a, b in zip(*runs, strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4, abs=1e-7)


def features(limit: int) -> VisionFeatures:
    model, _ = random_vlm()
    tower = part_module(model, "vision_encoder").requires_grad_(False)
    run_without_graph_where_frozen(tower, model.config)
    return VisionFeatures(model, cache_bytes=limit)


def test_the_cache_keeps_within_its_bytes_and_drops_the_oldest():
    one = features(0).of(torch.randn(1, 3, 32, 32), [picture(0)])
    store = features(2 * one.numel() * 4)
    pixels = [torch.randn(1, 3, 32, 32) for _ in range(3)]
    for number in (0, 1, 0, 2, 0, 1):  # 1 is the oldest when 2 comes
        store.of(pixels[number], [picture(number)])
    assert store.tower_tiles == 4
    store.of(torch.randn(3, 3, 32, 32), [picture(7)])  # larger than the cache: computed, not kept
    store.of(pixels[0], [picture(0)])
    assert store.tower_tiles == 7


def test_pictures_that_differ_in_one_pixel_are_two():
    store = features(2**20)
    other = picture(0)
    other.putpixel((3, 3), (1, 2, 3))
    store.of(torch.zeros(1, 3, 32, 32), [picture(0)])
    store.of(torch.ones(1, 3, 32, 32), [other])
    assert store.tower_tiles == 2


def test_a_tower_that_trains_is_not_cached(model, tmp_path):
    with pytest.raises(RecipeError, match="`vision_features: cache` is for a frozen vision encoder"):
        make_trainer(model, tmp_path, vision_features="cache", trainable=["vision_encoder", "projector"])
    trainer = make_trainer(model, tmp_path, trainable=["vision_encoder", "projector"])
    assert trainer._vision is None

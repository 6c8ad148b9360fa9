"""Loss, log-probabilities, entropies and every gradient equal those of TRL's own GRPOTrainer on one recorded batch."""

import pytest
import torch
from parity.recorded import Recording, run_ours, run_trl
from random_families import FAMILIES

LOSS_TYPES = ["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "luspo", "sapo"]


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "padded"])
def recording(tmp_path_factory, request) -> Recording:
    """With the prompt run once a group, and once a completion."""
    return Recording(tmp_path_factory.mktemp("model"), share_prefix=request.param)


def assert_equal(ours, theirs) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6, abs=1e-7)
    for mine, reference in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert mine.shape == reference.shape
        if len(mine):
            assert (mine - reference).abs().max() <= 5e-6
    for mine, reference in zip(ours.entropies, theirs.entropies, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys()
    whole = torch.stack([reference.norm() for reference in theirs.gradients.values()]).norm()
    for name, reference in theirs.gradients.items():
        if "vision_tower" in name and name.endswith("k_proj.bias") and reference.norm() <= 1e-6 * whole:
            assert ours.gradients[name].norm() <= 1e-6 * whole, name
            continue  # it adds the same to every score of a query: the gradient is 0 but for rounding
        error = (ours.gradients[name] - reference).norm() / reference.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(recording, tmp_path, loss_type, beta):
    """On policy; the reference is the starting model, so that the weights move to make the KL term count."""
    changes = {"loss_type": loss_type, "beta": beta}
    move = 0.01 if beta else 0.0
    assert_equal(run_ours(recording, tmp_path, move, **changes), run_trl(recording, tmp_path, move, **changes))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_policy(recording, tmp_path, loss_type):
    """Several updates on one rollout: ratios away from 1, clipping at work."""
    changes = {"loss_type": loss_type, "num_iterations": 2, "epsilon": 0.05, "epsilon_high": 0.08}
    assert_equal(run_ours(recording, tmp_path, 0.02, **changes), run_trl(recording, tmp_path, 0.02, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"delta": 1.02},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "grpo"},
        {"top_entropy_quantile": 0.4},
        {"entropy_coef": 0.01},
        {"temperature": 0.7},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"use_bias_correction_kl": False, "beta": 0.1},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=str,
)
def test_other_keys(recording, tmp_path, changes):
    changes = {"num_iterations": 2, "epsilon": 0.05, **changes}
    assert_equal(run_ours(recording, tmp_path, 0.02, **changes), run_trl(recording, tmp_path, 0.02, **changes))


@pytest.mark.parametrize("changes", [{}, {"entropy_coef": 0.01}, {"temperature": 0.7, "beta": 0.04}], ids=str)
def test_projector_only(recording, tmp_path, changes):
    """R1V's own GRPO: the head has its gradients with its logits, unless the loss has an entropy too."""
    changes = {"trainable": ["projector"], "num_iterations": 2, "epsilon": 0.05, **changes}
    assert_equal(run_ours(recording, tmp_path, 0.02, **changes), run_trl(recording, tmp_path, 0.02, **changes))


@pytest.mark.parametrize("mode", ["token_mask", "token_truncate", "sequence_mask", "sequence_truncate"])
def test_sampler_correction(recording, tmp_path, mode):
    changes = {
        "corrected": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.1,
        "vllm_importance_sampling_clip_min": 0.5,
        "num_iterations": 2,
    }
    assert_equal(run_ours(recording, tmp_path, 0.02, **changes), run_trl(recording, tmp_path, 0.02, **changes))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches(recording, tmp_path, loss_type):
    """Two groups a micro-batch. TRL shuffles rows over micro-batches and we keep groups whole, so the test cuts TRL's
    batch in order: the sum over an optimizer step is what must agree."""
    changes = {"loss_type": loss_type, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert_equal(run_ours(recording, tmp_path, 0.0, **changes), run_trl(recording, tmp_path, 0.0, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    """Off policy with a KL term; no, one and three pictures of unlike size, one group of equal rewards."""
    recorded = Recording(tmp_path / "model", family=family)
    changes = {"beta": 0.04, "num_iterations": 2, "epsilon": 0.05}
    theirs = run_trl(recorded, tmp_path, 0.02, **changes)
    for recorded.share_prefix in (True, False):
        assert_equal(run_ours(recorded, tmp_path, 0.02, **changes), theirs)


def test_a_wrong_position_would_be_seen(recording, tmp_path, monkeypatch):
    """Planted: the token before the right one predicts."""
    import r1v_rl.grpo.batch as batch

    scored = batch.Scored
    monkeypatch.setattr(batch, "Scored", lambda positions, targets, rows: scored(positions - 1, targets, rows))
    with pytest.raises(AssertionError):
        assert_equal(run_ours(recording, tmp_path, 0.0), run_trl(recording, tmp_path, 0.0))


def test_a_swapped_image_would_be_seen(recording, tmp_path, monkeypatch):
    """Planted: the first two tiles change places."""
    import r1v_rl.grpo.batch as batch

    original = batch._vision

    def swapped(prompts, owners):
        inputs, rows = original(prompts, owners)
        inputs["pixel_values"][[0, 1]] = inputs["pixel_values"][[1, 0]]
        return inputs, rows

    monkeypatch.setattr(batch, "_vision", swapped)
    with pytest.raises(AssertionError):
        assert_equal(run_ours(recording, tmp_path, 0.0), run_trl(recording, tmp_path, 0.0))

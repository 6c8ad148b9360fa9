"""Launches that would not train as they were asked to are refused; whole weights of a model that is not spread."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from grpo import tiny_run
from random_vlm import random_vlm, save_random_vlm
from sft import tiny_sft
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from r1v_rl.errors import CheckpointError, UserError
from r1v_rl.models.parts import freeze_all_but, part_hashes
from r1v_rl.models.sharding import hashes_by_part, load_whole, unsharded_twin, whole_hashes, whole_state
from r1v_rl.training.engines import check_engine, prepare_engine

_PLUGIN = {
    "fsdp_version": 2, "cpu_ram_efficient_loading": False, "mixed_precision_policy": None,
    "transformer_cls_names_to_wrap": None,
}  # fmt: skip


def launched(kind: DistributedType, **plugin) -> SimpleNamespace:
    """An accelerator of two processes, as a launcher may have made it."""
    settings = SimpleNamespace(**{**_PLUGIN, **plugin})
    state = SimpleNamespace(fsdp_plugin=settings, deepspeed_plugin=settings)
    return SimpleNamespace(distributed_type=kind, num_processes=2, state=state, mixed_precision="no")


@pytest.mark.parametrize("kind", [DistributedType.MULTI_CPU, DistributedType.FSDP])
def test_processes_with_bare_models_are_refused(kind):
    with pytest.raises(UserError, match="would not exchange gradients"):
        check_engine(launched(kind), nn.Linear(2, 2))
    with pytest.raises(UserError, match="would not exchange gradients"):
        check_engine(launched(DistributedType.DEEPSPEED, zero_stage=3), nn.Linear(2, 2))


@pytest.mark.parametrize("tiny", [tiny_run, tiny_sft])
def test_one_process_with_several_gpus_is_refused(tmp_path, monkeypatch, tiny):
    """transformers would wrap the model in `nn.DataParallel`, which cuts packed rows and pictures anywhere."""
    model = save_random_vlm(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tiny.make_trainer(model, tmp_path)  # `use_cpu`
    with pytest.raises(UserError, match=r"sees 2 GPUs.*accelerate launch --num_processes 2.*CUDA_VISIBLE_DEVICES"):
        tiny.make_trainer(model, tmp_path, use_cpu=False)


def test_another_engine_than_the_launch_file_asks_for_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP, and accelerate runs MULTI_CPU"):
        prepare_engine(SimpleNamespace(accelerator=launched(DistributedType.MULTI_CPU)))


@pytest.mark.parametrize(
    ("plugin", "named"),
    [({"fsdp_version": 1}, "fsdp_version: 2"), ({"cpu_ram_efficient_loading": True}, "set it to false")],
)
def test_settings_of_fsdp_that_do_not_work_are_refused(plugin, named):
    with pytest.raises(UserError, match=named):
        prepare_engine(SimpleNamespace(accelerator=launched(DistributedType.FSDP, **plugin)))


def test_fsdp_in_bfloat16_hands_out_log_probabilities_and_sums_gradients_in_float32():
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16, "output_dtype": torch.bfloat16}
    accelerator = launched(DistributedType.FSDP, mixed_precision_policy=MixedPrecisionPolicy(**half))
    accelerator.device = torch.device("cpu")
    model, _ = random_vlm()
    prepare_engine(SimpleNamespace(accelerator=accelerator, model=freeze(model)))
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert accelerator.state.fsdp_plugin.ignored_modules == [model.model.vision_tower]
    assert "InternVLVisionLayer" not in accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    assert "Qwen2DecoderLayer" in accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap


def freeze(model):
    freeze_all_but(model, ["projector", "language_model"])
    return model


def test_whole_weights_of_a_model_that_is_not_spread():
    model, _ = random_vlm()
    model.lm_head.weight = model.get_input_embeddings().weight
    state = whole_state(model)
    assert state["lm_head.weight"] is state["model.language_model.embed_tokens.weight"], "a tie is lost"
    assert hashes_by_part(whole_hashes(model)) == part_hashes(model)
    twin = unsharded_twin(model)
    load_whole(twin, state)
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in state.items())
    with pytest.raises(CheckpointError, match="no `another`"):
        load_whole(twin, {"another": torch.zeros(1)})

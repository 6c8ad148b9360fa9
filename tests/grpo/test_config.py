"""Keys of the GRPO recipe: TRL's are taken or refused by name, never ignored."""

from dataclasses import fields

import pytest
import trl

from r1v_rl.errors import RecipeError
from r1v_rl.grpo.config import REFUSED_KEYS, GRPOConfig

PLAIN = {"num_generations": 4, "per_device_train_batch_size": 8, "bf16": False}
OTHER_VALUES = {
    "cache_implementation": "static",
    "ds3_gather_for_generation": False,
    "log_completions_hub_repo": "me/rollouts",
    "log_multimodal": False,
    "log_unique_prompts": True,
    "max_tool_calling_iterations": 3,
    "num_generations_eval": 2,
    "off_policy_mask_threshold": 0.5,
    "router_aux_loss_coef": 0.1,
    "trust_remote_code": True,
    "use_adaptive_entropy": True,
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "vllm_enable_sleep_mode": True,
    "vllm_importance_sampling_cap": 2.0,
    "vllm_model_impl": "transformers",
    "vllm_group_port": 51217,
    "vllm_server_host": "127.0.0.1",
    "vllm_server_port": 8001,
    "vllm_structured_outputs_regex": "a+",
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_key_that_is_not_implemented_is_refused_by_name(tmp_path, key):
    said = {"use_transformers_paged": "use_transformers_continuous_batching"}.get(key, key)  # TRL renamed it
    with pytest.raises(RecipeError, match=said):
        GRPOConfig(output_dir=str(tmp_path), **PLAIN, **{key: OTHER_VALUES[key]})


def test_every_key_of_trl_is_there_and_one_default_differs():
    theirs = {f.name: f.default for f in fields(trl.GRPOConfig)}
    ours = {f.name: f.default for f in fields(GRPOConfig)}
    assert theirs.keys() <= ours.keys()
    assert {k for k in theirs if theirs[k] != ours[k]} == {"vllm_importance_sampling_mode"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "vespo"}, "loss_type.*dapo.*vespo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level.*word"),
        ({"scale_rewards": "max"}, "scale_rewards.*max"),
        ({"trainable": ["head"]}, "trainable.*head"),
        ({"trainable": []}, "trainable"),
        ({"per_device_train_batch_size": 6}, "generation_batch_size.*6.*4"),
        ({"num_generations": 1, "per_device_train_batch_size": 8}, "at least 2 generations"),
        ({"sync_ref_model": True}, "sync_ref_model.*beta"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size.*needs `vllm_mode: server`"),
        ({"use_vllm": True, "vllm_mode": "elsewhere"}, "vllm_mode.*colocate.*server.*elsewhere"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_num_servers": 0}, "vllm_num_servers.*at least 1.*0"),
        ({"use_vllm": True, "vllm_mode": "server", "rollout_timeout_s": 0}, "rollout_timeout_s.*above 0"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_devices": ["0", "1"]},
            "vllm_server_devices.*1 servers.*2",
        ),
        ({"use_vllm": True, "vllm_mode": "server", "serve_kwargs": {"api_key": "x"}}, "serve_kwargs.*api_key"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        GRPOConfig(output_dir=str(tmp_path), **{**PLAIN, **changes})


def test_servers_as_a_recipe_names_them(tmp_path, monkeypatch):
    """One address or several; weights go through main memory, for other machines through the run's folder."""
    monkeypatch.setenv("VLLM_API_KEY", "a key of some length")
    server = {"output_dir": str(tmp_path), "use_vllm": True, "vllm_mode": "server", **PLAIN}
    for urls, folder in [("http://localhost:8000", None), (["http://[::1]:1", "http://10.0.0.1:2"], str(tmp_path))]:
        settings = GRPOConfig(**server, vllm_server_base_url=urls).server_settings()
        assert list(settings.urls) == ([urls] if isinstance(urls, str) else urls) and settings.weight_folder == folder
    own = GRPOConfig(**server, vllm_num_servers=2, serve_kwargs='{"data-parallel-size": 2}').server_settings()
    assert own.num_servers == 2 and not own.urls and own.options == {"data-parallel-size": 2}
    assert own.log_folder == tmp_path

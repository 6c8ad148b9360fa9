"""Keys of the supervised recipes: TRL's are taken or refused by name, never ignored."""

from dataclasses import fields

import pytest
import trl

from r1v_rl.config import read_recipe
from r1v_rl.errors import RecipeError
from r1v_rl.sft.config import REFUSED_KEYS, AlignConfig, SFTConfig
from r1v_rl.sft.main import ALIGN_CONFIGS, SFT_CONFIGS

OTHER_VALUES = {
    "assistant_only_loss": True,
    "auto_find_batch_size": True,
    "completion_only_loss": False,
    "dataset_num_proc": 4,
    "dataset_text_field": "body",
    "eval_packing": False,
    "ignore_data_skip": True,
    "label_smoothing_factor": 0.1,
    "length_column_name": "len",
    "packing_strategy": "wrapped",
    "pad_to_multiple_of": 8,
    "pad_token": "<pad>",
    "router_aux_loss_coef": 0.1,
    "truncation_mode": "keep_end",
    "trust_remote_code": True,
    "use_liger_kernel": True,
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
@pytest.mark.parametrize("config", [SFTConfig, AlignConfig])
def test_a_key_that_is_not_implemented_is_refused_by_name(tmp_path, key, config):
    with pytest.raises(RecipeError, match=f"`{key}` is a TRL key.*: .+"):
        config(output_dir=str(tmp_path), bf16=False, **{key: OTHER_VALUES[key]})


def test_values_that_say_what_is_done_anyway_are_taken(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), bf16=False, completion_only_loss=True, pad_to_multiple_of=None)
    assert config.completion_only_loss is True


def test_every_key_of_trl_is_there_with_its_default():
    theirs = {f.name: f.default for f in fields(trl.SFTConfig)}
    ours = {f.name: f.default for f in fields(SFTConfig)}
    assert theirs.keys() <= ours.keys()
    assert {k for k in theirs if theirs[k] != ours[k]} == set()
    align = {f.name: f.default for f in fields(AlignConfig)}
    assert {k for k in ours if ours[k] != align[k]} == {"packing", "trainable"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["head"]}, "trainable.*head"),
        ({"trainable": []}, "trainable"),
        ({"packing": True, "max_length": None}, "packing.*max_length"),
        ({"vision_features": "cache", "trainable": ["vision_encoder"]}, "vision_features: cache.*frozen"),
        ({"loss_weighting": "square"}, "loss_weighting.*sqrt_length.*square"),
        ({"vision_features": "disk"}, "vision_features.*recompute or cache.*disk"),
        ({"loss_type": "focal"}, "loss_type.*focal"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy.*random or sequential"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        SFTConfig(output_dir=str(tmp_path), **{"bf16": False, **changes})


@pytest.mark.parametrize("configs", [SFT_CONFIGS, ALIGN_CONFIGS])
def test_help_and_unknown_keys(configs, capsys):
    with pytest.raises(SystemExit):
        read_recipe(configs, ["--help"])
    assert "--loss_weighting" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="Did you mean `loss_weighting`"):
        read_recipe(configs, ["--loss_weightings", "token"])

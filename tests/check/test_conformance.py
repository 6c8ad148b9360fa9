"""`r1v-rl check model`: what agrees passes, and each way of being wrong is named."""

import re

import pytest
import torch
from random_families import FAMILIES, save_random_family
from random_vlm import random_vlm, save_random_vlm

from r1v_rl import cli
from r1v_rl.check import conformance
from r1v_rl.grpo import batch as batches


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_random_family(root / family, family)
    save_random_vlm(root / "internvl")
    return root


@pytest.fixture
def check(capfd):
    def run(folder, *words):
        code = cli.main(["check", "model", "--model_name_or_path", str(folder), *words])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("family", [*FAMILIES, "internvl"])
def test_every_family_agrees(check, folders, family):
    code, out, err = check(folders / family, "--use_vllm", "false")
    assert code == 0, err
    for subject in ("padded", "shared"):
        (errors,) = re.findall(rf"  {subject} .*: text (\S+), one picture (\S+), three pictures (\S+)", out)
        assert max(map(float, errors)) <= 5e-6
    assert re.search(r"tokens +visual tokens of one picture \d+, of three \d+", out)
    assert "rollout" not in out


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_vllm_agrees(check, folders, family):
    code, out, err = check(folders / family)
    assert code == 0, err
    (errors,) = re.findall(
        r"rollout +vLLM, same prompt tokens: text (\S+), one picture (\S+), three pictures (\S+)", out
    )
    assert max(map(float, errors)) <= 1e-4


def test_bfloat16(check, folders):
    code, out, err = check(folders / "internvl", "--use_vllm", "false", "--dtype", "bfloat16")
    assert code == 0, err
    assert "in bfloat16" in out


def test_a_position_off_by_one_is_named(check, folders, monkeypatch):
    packed_row = batches._packed_row

    def shifted(*args):
        kwargs, positions = packed_row(*args)
        return {
            **kwargs,
            "position_ids": kwargs["position_ids"] + torch.arange(kwargs["position_ids"].shape[1]),
        }, positions

    monkeypatch.setattr(batches, "_packed_row", shifted)
    code, out, err = check(folders / "internvl", "--use_vllm", "false")
    assert code == 2 and "shared: every prompt once" in err and "padded" not in err
    assert re.search(r"padded +all rows padded", out)


def test_rollouts_of_another_model_are_named(check, folders, monkeypatch, tmp_path):
    other = save_random_vlm(tmp_path / "other", seed=1)
    engine = conformance.standalone_engine
    monkeypatch.setattr(
        conformance, "standalone_engine", lambda path, *args, **kwargs: engine(str(other), *args, **kwargs)
    )
    code, _, err = check(folders / "internvl")
    assert code == 2 and "rollout: vLLM, same prompt tokens: log-probabilities differ" in err


def test_a_blind_model_is_named(check, tmp_path):
    model, processor = random_vlm()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code, _, err = check(tmp_path, "--use_vllm", "false")
    assert code == 2 and "pictures: a grey picture changes log-probabilities by 0e+00 at most" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
        ([], "`check model` needs `--model_name_or_path`"),
        (["--model_name_or_path", "x", "--dtype", "int8"], "dtype must be float32 or bfloat16, received 'int8'"),
        (["--model_nme_or_path", "x"], "model_name_or_path"),
    ],
)
def test_bad_input(capsys, words, message):
    assert cli.main(["check", "model", *words]) == 2
    assert message in capsys.readouterr().err

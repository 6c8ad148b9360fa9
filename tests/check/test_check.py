"""`r1v-rl check` beyond GRPO: every command's recipe, chains, and what is not on this machine."""

import json
import re
from pathlib import Path

import pytest
import yaml
from random_families import save_random_family
from random_vlm import save_random_vlm
from transformers import MistralConfig

from r1v_rl import cli
from r1v_rl.models import families

SFT = {
    "dataset_name": "scenes", "dataset_size": 40, "dataset_kwargs": {"chains": "brief", "num_images": 1},
    "output_dir": "out", "bf16": False, "use_cpu": True, "per_device_train_batch_size": 8, "max_length": 512,
}  # fmt: skip
GRPO = {
    "dataset_name": "scenes", "dataset_size": 16, "output_dir": "out", "bf16": False, "use_cpu": True,
    "per_device_train_batch_size": 8, "max_completion_length": 32, "answer_kind": "text",
}  # fmt: skip


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return str(save_random_vlm(tmp_path_factory.mktemp("vlm")))


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """check(command, recipe, *words) -> (exit code, output, errors), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(command, recipe, *words):
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        code = cli.main(["check", *([command] if command else []), "--config", "recipe.yaml", *words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def test_sft(check, vlm):
    code, out, err = check("sft", {**SFT, "model_name_or_path": vlm})
    assert code == 0, err
    assert re.search(r"targets +40 rows, \d+ tokens on average, \d+ at most", out)
    assert "8 samples a step and process, 40 in all, 5 steps an epoch, 15 steps on one process" in out
    code, out, _ = check("sft", {**SFT, "model_name_or_path": vlm, "packing": True, "num_train_epochs": 1})
    assert code == 0 and re.search(r"8 rows of 512 tokens a step and process, [1-9] in all, 1 steps an epoch", out)


def test_sft_without_targets(check, vlm):
    recipe = {**SFT, "model_name_or_path": vlm, "dataset_kwargs": {"num_images": 1}}
    code, _, err = check("sft", recipe)
    assert code == 2 and "it has no target text; fill the column `completion`" in err


def test_training_rows_that_are_held_out_rows(check, vlm, tmp_path):
    """The same scenes under another split's name: their words and pictures are the same."""
    rows = {"eval_dataset_name": "scenes", "eval_dataset_size": 20, "eval_dataset_split": "train"}
    recipe = {**GRPO, **rows, "model_name_or_path": vlm}
    code, out, err = check("grpo", recipe)
    assert code == 0 and re.search(r"overlap +16 of 16 training rows overlap with 16 of 20 test rows", out), err
    code, _, err = check("grpo", {**recipe, "contamination_check": "refuse"})
    assert code == 2 and "overlap: 16 of 16 training rows overlap" in err and " is scenes-train-42-0 (" in err
    benchmark = {**recipe, "contamination_benchmarks": ["math500=bench.jsonl"], "eval_dataset_name": None}
    text = "A clerk counts red and blue squares in nine boxes and writes the sum of both on the last page of his book."
    (tmp_path / "bench.jsonl").write_text(json.dumps({"problem": text, "answer": "1"}) + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": f"{text} What is it?", "answer": "1"}) + "\n")
    code, out, err = check("grpo", {**benchmark, "dataset_name": "train.jsonl"})
    assert re.search(r"overlap +1 of 1 training rows overlap with 1 of 1 test rows \(1 by text\)", out), err
    code, _, err = check("grpo", {**recipe, "contamination_benchmarks": ["mth500"]})
    assert code == 2 and "received 'mth500'. Did you mean `math500`" in err
    code, out, err = check("grpo", {**recipe, "eval_dataset_split": "heldout", "contamination_check": "refuse"})
    assert code == 0 and "none of 16 training rows is one of 20 test rows" in out, err


def test_align_joins_parts_or_goes_on(check, vlm):
    parts = {"vision_encoder": "tiny/vision_encoder", "language_model": "tiny/reasoning_llm"}
    code, out, err = check("align", {**SFT, **parts})
    assert code == 0 and "tiny/reasoning_llm is a qwen2, hidden size 128" in out, err
    code, _, err = check("align", SFT)
    assert code == 2 and "align needs `model_name_or_path`, or both" in err
    code, _, err = check("align", {**SFT, **parts, "language_model": "tiny/reasoning"})
    assert code == 2 and "the shipped tiny parts are" in err


def test_compose_and_transfer(check, vlm):
    recipe = {"vision_encoder": "tiny/vision_encoder", "language_model": vlm, "output_dir": "out"}
    code, _, err = check("compose", recipe)
    assert code == 2 and "`language_model` must be one of qwen2, qwen3, llama" in err
    recipe = {"projector_from": vlm, "language_model": "tiny/reasoning_llm", "output_dir": "out"}
    code, _, err = check("transfer", recipe)
    assert code == 2 and "writes vectors of 64 numbers, tiny/reasoning_llm reads 128" in err


def test_iterate(check, vlm, tmp_path):
    (tmp_path / "scores.py").write_text("def five(completions, **_): return [5] * len(completions)\n")
    recipe = {**SFT, "model_name_or_path": vlm, "scorer": "scores.py:five", "taus": [1, 5], "learning_rates": [1, 2]}
    code, out, err = check("iterate", recipe)
    assert code == 0 and "2: score >= 1 at 1, score >= 5 at 2" in out and "can be kept as parquet" in out, err
    code, _, err = check("iterate", {**recipe, "scorer": "scores.py:six"})
    assert code == 2 and "scorer: " in err and "six" in err
    tested = {"eval_dataset_name": "scenes", "eval_dataset_split": "train", "contamination_check": "refuse"}
    tested |= {"eval_dataset_size": 40, "eval_dataset_kwargs": SFT["dataset_kwargs"]}
    code, _, err = check("iterate", {**recipe, **tested})
    assert code == 2 and "overlap: 40 of 40 training rows overlap" in err
    code, _, err = check("iterate", {**recipe, "taus": [1]})
    assert code == 2 and "`taus` and `learning_rates` must have one entry for each round" in err


def test_evaluate(check, vlm):
    recipe = {"model_name_or_path": vlm, "eval_dataset_name": "scenes", "eval_dataset_size": 5}
    code, out, err = check("evaluate", recipe)
    assert code == 0 and re.search(r"longest \d+ tokens", out), err
    code, _, err = check("evaluate", {**recipe, "max_completion_length": 1020})
    assert code == 2 and "above the context of 1024" in err


def test_grpo_says_how_prompts_run(check, vlm):
    recipe = {**GRPO, "model_name_or_path": vlm}
    code, out, err = check("grpo", recipe)
    assert code == 0 and re.search(r"update +every prompt and its images are run once a group", out), err
    code, out, err = check("grpo", {**recipe, "use_peft": True, "lora_dropout": 0.05})
    assert code == 0 and "once a completion, because dropout (`lora_dropout: 0.05`)" in out, err
    code, out, err = check("grpo", {**recipe, "share_prefix": False})
    assert code == 0 and "once a completion (`share_prefix: false`)" in out, err


def test_another_family_and_a_model_that_cannot_share(check, tmp_path):
    """Qwen2.5-VL with its own recipe; LLaVA whose language model sees a sliding window, in `grpo` and packed `sft`."""
    published = Path(__file__).parents[2] / "recipes" / "qwen2_5_vl_3b" / "grpo.yaml"
    save_random_family(tmp_path / "qwen", "qwen2_5_vl")
    recipe = {**yaml.safe_load(published.read_text()), **GRPO, "model_name_or_path": "qwen", "dtype": "float32"}
    recipe |= {"eval_dataset_name": "scenes", "eval_dataset_size": 4, "num_generations": 8}
    del recipe["eval_dataset_split"]
    code, out, err = check("grpo", recipe, "--missing_ok")
    assert code == 0 and re.search(r"update +every prompt and its images are run once a group", out), err
    save_random_family(tmp_path / "sliding", "llava", text_class=MistralConfig, sliding_window=64)
    reason = "some of its layers see a sliding window only"
    code, out, err = check("grpo", {**GRPO, "model_name_or_path": "sliding"})
    assert code == 0 and f"once a completion, because {reason}" in out, err
    code, _, err = check("sft", {**SFT, "model_name_or_path": "sliding", "packing": True})
    assert code == 2 and f"{reason}; set `packing: false`" in err


def test_what_is_not_on_this_machine(check):
    recipe = {**GRPO, "model_name_or_path": "some/hub-id", "dataset_name": "rows.jsonl", "use_cpu": False, "bf16": True}
    code, _, err = check("grpo", recipe)
    assert code == 2  # here it cannot run
    code, out, err = check("grpo", recipe, "--missing_ok")
    assert code == 0, err
    for line in (
        "`dataset_name` rows.jsonl is not on this machine",
        "`model_name_or_path` some/hub-id is not on this machine",
        "1 prompts x 8 completions a rollout of one process",
        "accuracy, format found, not tried",
    ):
        assert line in out
    code, _, err = check("grpo", {**recipe, "reward_funcs": ["acuracy"]}, "--missing_ok")
    assert code == 2 and "'acuracy' must be one of accuracy, cosine, format" in err
    code, _, err = check("grpo", {**recipe, "num_generations": 3}, "--missing_ok")
    assert code == 2 and "divisible by num_generations (3)" in err


def test_the_command_of_a_recipe(check, tmp_path):
    code, _, err = check(None, GRPO)
    assert code == 2 and "does not say which command it is for: name it" in err
    code, _, err = check("report", GRPO)
    assert code == 2 and "check knows recipes of compose" in err


def test_every_stage_of_a_chain(check, tmp_path, vlm):
    (tmp_path / "grpo.yaml").write_text(json.dumps({**GRPO, "model_name_or_path": vlm}))
    (tmp_path / "sft.yaml").write_text(json.dumps({**SFT, "model_name_or_path": vlm}))
    listed = [
        {"name": "one", "command": "sft", "config": "sft.yaml"},
        {"name": "two", "command": "grpo", "config": "grpo.yaml", "from": {"one": "model_name_or_path"}},
    ]
    chain = {"output_dir": "out", "stages": listed, "evaluate": {"eval_dataset_name": "scenes", "eval_dataset_size": 4}}
    code, out, err = check("run", chain)
    assert code == 0, err
    assert "`model_name_or_path` out/one is made by stage one" in out
    listed[1]["from"] = {"one": "model_name"}
    code, _, err = check("run", chain)
    assert code == 2 and "stage two: keys: `model_name` is not a recipe key" in err
    listed[1]["from"] = {"one": "model_name_or_path"}
    code, _, err = check(
        "run", chain, "--one.learning_rate", "high", "--two.num_generations", "3", "--evaluate.top_p", "x"
    )
    assert code == 2 and err.count("\n") == 4
    for fault in ("3 fault(s)", "stage one: keys: `learning_rate`", "stage two: ", "evaluate: keys: `top_p`"):
        assert fault in err
    code, _, err = check("run", chain, "--two.num_generations", "3", "--until", "one")
    assert code == 0, err
    listed[1]["evaluate_with"] = {"instructoin": "Explain."}
    code, _, err = check("run", chain)
    assert code == 2 and "stage two: keys: `instructoin` is not a recipe key" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "starts one process, not 2"),
        ({"distributed_type": "FSDP", "num_processes": 2, "use_cpu": True, "fsdp_config": {}}, "replaces FSDP by DDP"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "zero3_save_16bit_model"),
        ({"distributed_type": "MULTI_GPU", "nmu_processes": 2}, "nmu_processes"),
    ],
)
def test_launch_files(tmp_path, capsys, content, message):
    lines = [
        f"{key}: {json.dumps(value)}" for key, value in {"compute_environment": "LOCAL_MACHINE", **content}.items()
    ]
    (tmp_path / "launch.yaml").write_text("\n".join(lines))
    assert cli.main(["check", "--config", str(tmp_path / "launch.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("command", "recipe"), [("sft", SFT), ("grpo", GRPO)])
def test_a_family_that_the_trainers_do_not_know(check, vlm, monkeypatch, command, recipe):
    monkeypatch.setattr(families, "SUPPORTED_MODEL_TYPES", ("llava",))
    code, _, err = check(command, {**recipe, "model_name_or_path": vlm})
    assert code == 2 and "is a `internvl` model; the trainers know llava" in err

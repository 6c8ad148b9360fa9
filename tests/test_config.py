"""Recipes: what a file and a command line may say, and what a user reads when they say something else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from transformers import IntervalStrategy

from r1v_rl.chain.recipe import read_chain
from r1v_rl.config import DataConfig, build_configs, checked_values, dump_recipe, parse_recipe, read_recipe
from r1v_rl.errors import RecipeError
from r1v_rl.secret_values import check_holds_no_secret

ROOT = Path(__file__).parents[1]

CLASSES = (trl.ModelConfig, DataConfig, trl.GRPOConfig)


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the arguments that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def read(arguments: list[str]) -> dict[str, Any]:
    return read_recipe(CLASSES, arguments)


def test_file_and_command_line_meet_in_one_instance_of_each_class(recipe, tmp_path):
    arguments = recipe(
        f"model_name_or_path: m\ndataset_name: scenes\noutput_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n"
    )
    model, data, train = parse_recipe(CLASSES, [*arguments, "--num_generations", "4", "--dataset_size", "7"])
    assert (model.model_name_or_path, data.dataset_name, data.dataset_size) == ("m", "scenes", 7)
    assert (train.num_generations, train.use_cpu) == (4, True)


def test_the_command_line_overrides_the_file(recipe):
    assert read([*recipe("beta: 0.1\nlearning_rate: 1e-5"), "--beta", "0.2"]) == {"beta": 0.2, "learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: 1e-6", 1e-6),  # YAML 1.1 reads this as text
        ("learning_rate: 1", 1.0),
        ("max_steps: '20'", 20),
        ("max_steps: 1e3", 1000),
        ("eval_strategy: no", IntervalStrategy.NO),  # YAML 1.1 reads this as false
        ("scale_rewards: false", "none"),
        ("report_to: wandb", "wandb"),
        ("report_to: [wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("reward_weights: [1, 0.5]", [1.0, 0.5]),
        ("reward_weights: 1", [1.0]),
        ("epsilon_high:", None),
        ("model_init_kwargs: {a: 1e-3}", {"a": 1e-3}),
        ("dataset_kwargs: '{kinds: [count]}'", {"kinds": ["count"]}),
        ("run_name: 2025", "2025"),
        ("lora_target_modules: all-linear", ["all-linear"]),
    ],
)
def test_values_take_the_type_of_their_key(recipe, line, expected):
    (value,) = read(recipe(line)).values()
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--reward_weights", "1", "0.5"], {"reward_weights": [1.0, 0.5]}),
        (["--report_to", "wandb", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
        (["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        (["--no_gradient_checkpointing"], {"gradient_checkpointing": False}),
        (["--gradient_checkpointing", "false"], {"gradient_checkpointing": False}),
        (["--learning-rate=3e-5"], {"learning_rate": 3e-5}),
        (["--epsilon_high", "none"], {"epsilon_high": None}),
        (["--generation_kwargs", '{"a": 1}'], {"generation_kwargs": {"a": 1}}),
        (["--beta", "-0.5"], {"beta": -0.5}),
    ],
)
def test_command_line_forms(arguments, expected):
    assert read(arguments) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-6", r"`learning_rat` is not a recipe key\. Did you mean `learning_rate`\?"),
        ("learning_rate: fast", r"`learning_rate` must be a number, received 'fast' \(str\)"),
        ("learning_rate: .nan", r"`learning_rate` must be a number"),
        ("max_steps: 1.5", r"`max_steps` must be a whole number, received 1\.5"),
        ("max_steps:", r"`max_steps` must be a whole number, received None"),
        ("max_steps: true", r"`max_steps` must be a whole number"),
        ("use_vllm: maybe", r"`use_vllm` must be true or false, received 'maybe'"),
        ("use_vllm: [true]", r"`use_vllm` must be true or false"),
        ("model_name_or_path: true", r"`model_name_or_path` must be text or null.*quote it"),
        ("model_name_or_path: {a: 1}", r"`model_name_or_path` must be text"),
        ("reward_weights: [1, two]", r"`reward_weights` must be a list of a number"),
        ("lr_scheduler_type: cosin", r"`lr_scheduler_type` must be one of linear, cosine"),
        ("dtype: float8", r"`dtype` must be one of auto, bfloat16, float16, float32, received 'float8'"),
        ("images_without_marks: drop", r"must be one of refuse, prepend"),
        ("env: {LD_PRELOAD: /tmp/x.so}", r"`env` is not a recipe key: set environment variables in the shell"),
        ("torch_dtype: float32", r"`torch_dtype` is not a recipe key: its name is `dtype` now"),
        ("max_prompt_length: 512", r"refused by its id"),
        ("beta: 0.1\nbeta: 0.2", r"recipe\.yaml:2: .*key `beta` is given twice"),
        ("model_init_kwargs: {a: 1, a: 2}", r"key `a` is given twice"),
        ("a: &x [1]\nb: *x", r"aliases"),
        ("run_name: !!python/object/apply:os.system [id]", r"recipe\.yaml:1: .*could not determine a constructor"),
        ("beta: 0.1\nrun_name: !!python/name:os.system", r"recipe\.yaml:2: .*could not determine a constructor"),
        ("run_name: !canary x", r"recipe\.yaml:1: .*!canary"),
        ("a: {b: 1, <<: {c: 2}}", r"recipe\.yaml:1: .*constructor"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"recipe\.yaml:2: .*aliases"),
        ("beta: " + "[" * 10_000, r"recipe\.yaml: .*nested too deep"),
        ("beta: 0.1\nmax_steps: " + "9" * 5000, r"recipe\.yaml:2: .*digits"),
        ("run_name: 2026-02-31", r"recipe\.yaml:1: .*day"),
        ("env: {PYTHONPATH: /tmp}", r"`env` is not a recipe key"),
        ("beta: [0.1", r"recipe\.yaml:\d: not a recipe"),
        ("- a\n- b", r"a recipe is a mapping"),
        ("1: 2", r"key 1 is not a name"),
        ("x: " + "a" * 1_000_001, r"at most 1000000 bytes"),
    ],
)
def test_bad_recipes_are_refused_by_name(recipe, text, message):
    with pytest.raises(RecipeError, match=message):
        read(recipe(text))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hub_token", "hf_canary", "hub_token` holds a secret.*HF_TOKEN"),
        ("model_init_kwargs", {"token": "hf_canary"}, r"model_init_kwargs\.token` holds a secret"),
        ("judge_kwargs", {"extra_headers": {"Authorization": "canary"}}, "extra_headers.Authorization` holds a secret"),
        ("serve_kwargs", {"hf-token": "canary"}, "hf-token` holds a secret"),
        ("judge_api_key_env", "sk-canary", "judge_api_key_env` must be the name of an environment variable"),
        ("judge_api_key_env", "SOMETHING", "_KEY, _TOKEN or _SECRET"),
        ("judge_base_url", "https://me:canary@host/v1", "judge_base_url` holds an address with a password"),
        ("judge_base_url", "https://:canary@host/v1", "address with a password"),
        ("run_name", "the run of canary-of-mine", "run_name` holds the value of the environment variable MY_API_KEY"),
        ("dataset_kwargs", {"kinds": ["canary-of-mine"]}, "dataset_kwargs.kinds` holds the value of"),
    ],
)
def test_secrets_are_refused_and_not_shown(recipe, monkeypatch, key, value, message):
    """In a file, named with it; on the command line; and given to a stage of a chain, whose command line shows it."""
    monkeypatch.setenv("MY_API_KEY", "canary-of-mine")
    attempts = [
        (r"recipe\.yaml: ", lambda: read(recipe(yaml.safe_dump({key: value})))),
        ("", lambda: checked_values(CLASSES, {key: value})),
        ("", lambda: read_chain(ROOT / "recipes/tiny/chain.yaml", overrides={"sft": {key: value}})),
    ]
    for where, attempt in attempts:
        with pytest.raises(RecipeError, match=where + ".*" + message) as refused:
            attempt()
        assert "canary" not in str(refused.value)
    with pytest.raises(RecipeError, match="holds a secret"):
        read(["--model_init_kwargs", "{token: hf_canary}"])


def test_what_only_sounds_like_a_secret_is_none(recipe):
    values = {"eos_token": "<|end|>", "judge_api_key_env": "MY_KEY_2", "num_memory_tokens": 4, "key": "value"}
    values |= {"judge_base_url": "http://host:8000/v1", "system_prompt": "Write to me@host, or https://x.org/a:b@c"}
    check_holds_no_secret(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learn", "1"], r"`learn` is not a recipe key"),
        (["--num_generation", "4"], r"Did you mean `num_generations`\?"),
        (["--num_generations"], r"--num_generations: expected one argument"),
        (["--num_generations", "x"], r"`num_generations` must be a whole number or null, received 'x'"),
        (["scenes"], r"values follow their key .*'scenes'"),
        (["--config"], r"--config must be followed by a YAML file"),
        (["--config", "missing.yaml"], r"missing\.yaml, which is not a file"),
        (["--config", "a.yaml", "--config", "b.yaml"], r"once"),
    ],
)
def test_bad_command_lines_are_refused_by_name(arguments, message):
    with pytest.raises(RecipeError, match=message):
        read(arguments)


def test_not_utf8_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("run_name: Füße".encode("latin-1"))
    with pytest.raises(RecipeError, match="UTF-8"):
        read(["--config", str(path)])


def test_what_a_class_objects_to_becomes_a_recipe_error(tmp_path):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 3}
    with pytest.raises(RecipeError, match=r"generation_batch_size .* must be divisible by num_generations"):
        build_configs(CLASSES, values)


def test_a_key_without_a_default_must_be_set():
    @dataclass
    class Stage:
        rounds: int
        names: list[str] = field(default_factory=list)

    with pytest.raises(RecipeError, match="the recipe must set rounds"):
        parse_recipe((Stage,), [])
    (stage,) = parse_recipe((Stage,), ["--rounds", "3", "--names", "a"])
    assert (stage.rounds, stage.names) == (3, ["a"])


def test_a_dumped_recipe_reads_back_as_the_same_values(recipe, tmp_path):
    text = "eval_strategy: no\nlearning_rate: 1e-6\nreport_to: [wandb]\nmodel_init_kwargs: {eos_token: x}\n"
    values = read(recipe(text))
    dumped = dump_recipe(values)
    again = tmp_path / "again.yaml"
    again.write_text(dumped)
    assert read(["--config", str(again)]) == values
    assert yaml.safe_load(dumped)["eval_strategy"] == "no"


def test_help_lists_every_key_with_its_text(capsys):
    with pytest.raises(SystemExit) as stopped:
        read(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for key in ("--dataset_root", "--num_generations", "--model_name_or_path"):
        assert key in text
    assert "Folder that image paths start from" in text


@pytest.mark.parametrize("size", [0, -3])
def test_data_sizes_are_positive(size):
    with pytest.raises(RecipeError, match="dataset_size must be at least 1"):
        DataConfig(dataset_size=size)

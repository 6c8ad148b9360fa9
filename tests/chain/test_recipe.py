"""The chain file: what it says, what the command line overrides, and what is refused."""

import json
from pathlib import Path

import pytest

from r1v_rl.chain.inputs import changed_inputs, stage_inputs
from r1v_rl.chain.main import _forwarded, parse_arguments
from r1v_rl.chain.recipe import arguments, read_chain
from r1v_rl.config import DataConfig, read_recipe
from r1v_rl.errors import RecipeError
from r1v_rl.tracking.manifest import RUN_MANIFEST

STAGES = [
    {"name": "start", "command": "compose", "config": "start.yaml"},
    {"name": "moved", "command": "transfer", "config": "moved.yaml", "from": {"start": "projector_from"}},
    {
        "name": "last", "command": "grpo", "config": "last.yaml", "overrides": {"max_steps": 3},
        "from": {"start": "a_file", "moved": {"model_name_or_path": ".", "dataset_name": "rows/top.parquet"}},
    },
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    for name in ("start", "moved", "last"):
        (tmp_path / f"{name}.yaml").write_text("learning_rate: 1e-3\nmax_steps: 9\nseed: 5\n")
    return tmp_path


def chain(place, stages=STAGES, name="chain.yaml", **keys):
    (place / name).write_text(json.dumps({"output_dir": str(place / "out"), "stages": stages, **keys}))
    return place / name


def test_folders_seed_and_overrides_reach_the_stages(place):
    found = read_chain(chain(place, seed=1), seed=2, overrides={"last": {"learning_rate": 0.5}, "evaluate": {"x": 1}})
    start, moved, last = found.stages
    assert start.values() == {
        "learning_rate": 1e-3, "max_steps": 9, "seed": 2, "output_dir": str(place / "out" / "start")
    }  # fmt: skip
    assert "seed" not in moved.overrides  # transfer draws nothing
    assert moved.overrides["projector_from"] == str(place / "out" / "start")
    assert last.values() == {
        "learning_rate": 0.5, "max_steps": 3, "seed": 2, "output_dir": str(place / "out" / "last"),
        "a_file": str(place / "out" / "start"), "model_name_or_path": str(place / "out" / "moved"),
        "dataset_name": str(place / "out" / "moved" / "rows" / "top.parquet"),
    }  # fmt: skip
    assert read_chain(chain(place)).stages[0].values()["seed"] == 5  # without a seed of its own the recipes' stay
    assert found.evaluate is None
    assert read_chain(chain(place, evaluate={"a": 1}), seed=3).evaluate == {"a": 1, "seed": 3}


def changed(number, **keys):
    return [{**stage, **keys} if i == number else stage for i, stage in enumerate(STAGES)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "`stages` must be a list of stages"),
        (changed(0, command="componse"), "stage 1: `command` must be one of .* Did you mean `compose`"),
        (changed(0, comand="x"), "`comand` is not a key here; .* Did you mean `command`"),
        (changed(1, **{"from": {"strat": "x"}}), "no earlier stage is. Did you mean `start`"),
        (changed(0, **{"from": {"last": "x"}}), "`from` names `last`, which no earlier stage is"),
        (changed(1, **{"from": {"start": {"x": "../other"}}}), "paths inside it"),
        (changed(1, name="start"), "the name `start` is taken"),
        (changed(1, name="a/b"), "`name` is a folder's name"),
        (changed(2, config="gone.yaml"), "gone.yaml, which is not a file"),
        (changed(2, overrides=[1]), "`overrides` must be a mapping"),
        (changed(2, evaluate="yes"), "`evaluate` is true, false, or a list"),
        ([{"name": "x"}], "stage 1 must set command, config"),
    ],
)
def test_what_is_wrong_with_a_chain_is_said_before_it_runs(place, stages, message):
    with pytest.raises(RecipeError, match=message):
        read_chain(chain(place, stages))


def test_overrides_of_no_stage_are_refused(place):
    with pytest.raises(RecipeError, match=r"no stage `las`\. Did you mean `last`"):
        read_chain(chain(place), overrides={"las": {"x": 1}})


def test_the_command_line(place):
    words = ["chain.yaml", "--seed", "3", "--last.max_steps", "5", "--last.reward_funcs", "a", "b", "--until", "moved"]
    options, overrides = parse_arguments(
        [*words, "--last.learning_rate=1e-4", "--start.name", "text", "--start.on=true"]
    )
    assert (options.config, options.seed, options.until) == ("chain.yaml", 3, "moved")
    assert overrides == {
        "last": {"max_steps": 5, "reward_funcs": ["a", "b"], "learning_rate": 1e-4},
        "start": {"name": "text", "on": True},
    }
    for wrong in (["a.yaml", "b.yaml"], [], ["a.yaml", "--sed", "1"], ["a.yaml", "--last.max_steps"]):
        with pytest.raises(RecipeError):
            parse_arguments(wrong)


def test_values_become_words():
    values = {"a": 1e-4, "b": True, "c": None, "d": {"x": [1]}, "e": ["u", "v"], "f": [], "g": "two words"}
    assert arguments(values) == [
        "--a", "0.0001", "--b", "true", "--c", "null", "--d", '{"x": [1]}', "--e", "u", "v", "--f", "[]",
        "--g", "two words",
    ]  # fmt: skip


def test_a_command_reads_what_the_chain_was_told(place):
    """Text with a colon is text, and null is null, on its way through the chain and into `check` too."""
    text = r"Put the answer last: inside \boxed{}"
    given = ["--last.instruction", text, "--last.system_prompt", "null", "--last.dataset_kwargs", "{a: b}"]
    options, overrides = parse_arguments([str(chain(place)), *given])
    values = read_chain(Path(options.config), overrides=overrides).stage("last").overrides
    recipe = read_recipe((DataConfig,), arguments({key: values[key] for key in overrides["last"]}))
    assert recipe == {"instruction": text, "system_prompt": None, "dataset_kwargs": {"a": "b"}}
    assert parse_arguments(_forwarded(read_chain(Path(options.config)), options, overrides))[1] == overrides


def test_inputs_follow_recipe_parents_and_files(place):
    (place / "rows.jsonl").write_text("{}\n")
    (place / "reward.py").write_text("def f(): pass\n")
    (place / "folder").mkdir()
    (place / "folder" / "a.png").write_text("1\n")
    data = {"dataset_name": str(place / "rows.jsonl"), "reward_funcs": ["accuracy", f"{place}/reward.py:f"]}
    stages = changed(
        2, overrides={**data, "dataset_root": str(place / "folder"), "vision_encoder": "tiny/vision_encoder"}
    )
    found = read_chain(chain(place, stages))

    def inputs():
        return stage_inputs(found.stage("last"), found)

    before = inputs()
    assert before["parents"] == {"start": None, "moved": None}
    assert set(before["files"]) == {
        str(place / "rows.jsonl"), f"{place}/reward.py:f", str(place / "folder"), "tiny/vision_encoder"
    }  # fmt: skip
    assert inputs() == before

    for path in ("rows.jsonl", "reward.py", "folder/a.png"):
        text = (place / path).read_text()
        (place / path).write_text(text + "\n")
        assert len(changed_inputs(before, inputs())) == 1, path
        (place / path).write_text(text)
    (place / "folder" / "rows_of_another_stage.jsonl").write_text("{}\n")
    assert inputs() == before
    (place / "out" / "moved").mkdir(parents=True)
    assert inputs() == before  # not complete yet
    (place / "out" / "moved" / RUN_MANIFEST).write_text('{"stage": "transfer"}')
    assert changed_inputs(before, inputs()) == ["stage moved"]
    (place / "last.yaml").write_text("learning_rate: 1e-3  # only a comment\nmax_steps: 9\nseed: 5\n")
    assert changed_inputs(before, inputs()) == ["stage moved"]
    (place / "last.yaml").write_text("learning_rate: 2e-3\nmax_steps: 9\nseed: 5\n")
    assert changed_inputs(before, inputs()) == ["key learning_rate", "stage moved"]


def test_secrets_stay_out_of_the_record(place, monkeypatch):
    """They are refused; what was read before the variable was set is redacted."""
    path = chain(place, changed(2, overrides={"hub_model_id": "sk-very-secret-indeed"}))
    found = read_chain(path)
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret-indeed")
    assert "<JUDGE_API_KEY>" in json.dumps(stage_inputs(found.stage("last"), found))
    with pytest.raises(RecipeError, match="hub_model_id` holds the value of the environment variable JUDGE_API_KEY"):
        read_chain(path)

"""What a chain that goes on makes of a stage whose recipe, or whose place in the chain, has changed."""

import json

import pytest

from r1v_rl.chain.inputs import stage_inputs
from r1v_rl.chain.recipe import Chain, read_chain
from r1v_rl.chain.runner import Runner, _set_aside
from r1v_rl.chain.table import StageRow

STAGES = [
    {"name": "chains", "command": "distill", "config": "chains.yaml", "evaluate": False},
    {"name": "tuned", "command": "sft", "config": "tuned.yaml"},
]


def read(folder, stages=STAGES, **overrides) -> Chain:
    (folder / "chain.yaml").write_text(json.dumps({"output_dir": str(folder / "out"), "stages": stages}))
    return read_chain(folder / "chain.yaml", overrides=overrides)


@pytest.fixture
def begun(tmp_path):
    """A chain whose stages were begun; judges have replied to the first."""
    for name in ("chains", "tuned"):
        (tmp_path / f"{name}.yaml").write_text("seed: 5\njudge_model: j\nbudget_usd: 5\njudge_concurrency: 4\n")
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "config.yaml").write_text("seed: 5\n")
    (tmp_path / "out" / "chains" / "replies.jsonl").write_text('{"key": "k", "value": "paid for"}\n')
    runner = Runner(read(tmp_path))
    for stage in runner.chain.stages:
        runner.table.rows[stage.name] = StageRow(stage_inputs(stage, runner.chain))
    runner.table.write(runner.order)
    return tmp_path


def actions(chain: Chain) -> list[str]:
    return [plan.action for plan in Runner(chain).plans(chain.stages)]


def test_a_higher_budget_or_another_endpoint_goes_on(begun):
    changes = {"budget_usd": 50, "judge_concurrency": 1, "judge_base_url": "http://127.0.0.1:9/v1"}
    assert actions(read(begun, chains=changes, tuned={"logging_steps": 7})) == ["resume", "resume"]
    assert actions(read(begun, chains={"judge_model": "other"})) == ["replace", "resume"]


def test_rows_that_an_earlier_version_wrote_with_such_keys_go_on_too(begun):
    table = begun / "out" / "stages.json"
    content = json.loads(table.read_text())
    content["stages"][0]["inputs"]["recipe"]["budget_usd"] = 5
    table.write_text(json.dumps(content))
    assert actions(read(begun)) == ["resume", "resume"]


def test_what_judges_were_asked_is_there_for_the_new_recipe_too(begun):
    folder = begun / "out" / "chains"
    aside = _set_aside(folder)
    assert [path.name for path in folder.iterdir()] == ["replies.jsonl"]
    assert (folder / "replies.jsonl").read_bytes() == (aside / "replies.jsonl").read_bytes()
    _set_aside(begun / "out" / "tuned")
    assert not (begun / "out" / "tuned").exists()


def test_a_stage_that_was_left_out_for_a_while_is_known_again(begun):
    runner = Runner(read(begun, STAGES[:1]))
    runner.table.write(runner.order)
    assert "tuned" not in (begun / "out" / "stages.md").read_text()
    assert actions(read(begun)) == ["resume", "resume"]

"""`r1v-rl run` as a user meets it: stages run once, whatever kills it; signals, failures and changes are handled."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
from chain.tiny_chain import finish, judged_stage, processes_with, start, table, write_chain
from random_vlm import save_random_vlm
from scoring.chat_server import chat_server


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, model):
    """A chain that ran without interruption, and what it printed."""
    chain = write_chain(tmp_path_factory.mktemp("whole"), model)
    return chain, finish(chain)


def test_the_table_shows_every_stage(done):
    chain, output = done
    rows = json.loads((chain.parent / "out" / "stages.json").read_text())["stages"]
    assert [row["name"] for row in rows] == ["first", "second"]
    found = rows[1]["evaluations"]["."]
    assert found["num_rows"] == 12 and found["accuracy"].keys() == {"value", "low", "high"}
    assert {"blank_accuracy", "text_accuracy", "mean_length", "format_rate", "truncated_frac"} <= found.keys()
    lengths = [json.loads((chain.parent / "out" / row["name"] / "evaluation.json").read_text()) for row in rows]
    assert [row["settings"]["max_completion_length"] for row in lengths] == [6, 5]  # `evaluate_with` of the second
    assert rows[1]["parts"]["projector"].startswith("changed ")
    assert rows[1]["parts"]["vision_encoder"].startswith("unchanged ")
    assert rows[1]["parts"]["language_model"].startswith("unchanged ")
    assert rows[0]["seconds"] > 0
    assert (chain.parent / "out" / "stages.md").read_text() in output  # printed as saved
    assert len((chain.parent / "out" / "second" / "evaluation.jsonl").read_text().splitlines()) == 12 + 12 + 6
    manifest = json.loads((chain.parent / "out" / "second" / "manifest.json").read_text())
    assert manifest["seeds"] == {"seed": 1}


def test_a_chain_that_is_done_runs_nothing(done):
    chain, _ = done
    before = (chain.parent / "out" / "stages.json").read_text()
    started = time.monotonic()
    output = finish(chain)
    assert output.count("done, inputs unchanged") == 2 and "-m r1v_rl" not in output
    assert time.monotonic() - started < 20  # no torch, no model
    assert (chain.parent / "out" / "stages.json").read_text() == before


def test_killed_at_ten_random_moments(model, tmp_path):
    """A stage that was begun goes on, one that is done never runs again, no judge is asked for what it has said, and
    the table is that of a run that nothing disturbed."""
    rng, outputs = random.Random(0), []
    with chat_server(judge) as server:
        whole, killed = (judged_chain(tmp_path / name, model, server.base_url) for name in ("whole", "killed"))
        finish(whole)
        questions = server.asked.total()
        assert questions > 12 and set(server.asked.values()) == {1}
        lost = 0
        for _ in range(10):
            asked, kept = server.asked.total(), num_replies(killed)
            process = start(killed)
            time.sleep(rng.uniform(2.0, 24.0))
            process.kill()
            outputs.append(process.communicate(timeout=20)[0])  # an orphan would hold the pipe
            assert wait_until_gone(str(killed.parent)), "a child outlived the run"
            in_hand = server.asked.total() - asked - (num_replies(killed) - kept)
            assert in_hand in (0, 1)
            lost += in_hand
        outputs.append(finish(killed))
        assert server.asked.total() == 2 * questions + lost
    for name in ("first", "round"):
        states = [re.search(rf"\] {name}: (.*)", output) for output in outputs]
        words = [match[1] for match in states if match]
        assert words == sorted(words, key=["not done yet", "begun, not complete", "done, inputs unchanged"].index)
    assert not list(tmp_path.glob("killed/out/*.replaced-*"))
    assert table(killed) == table(whole)


def judged_chain(folder: Path, model: Path, base_url: str) -> Path:
    folder.mkdir()
    chain = write_chain(folder, model)
    content = json.loads(chain.read_text())
    content["stages"][1] = judged_stage(folder, base_url)
    chain.write_text(json.dumps(content))
    return chain


def judge(text: str, tries: int) -> str:
    """The reviser's and the rubric's reply."""
    return "<think>\nI count.\n</think>\n\\boxed{3}\nScore: 4"


def num_replies(chain: Path) -> int:
    """Replies on the disk, a line each; a line that the kill cut has no end."""
    return sum(path.read_bytes().count(b"\n") for path in chain.parent.glob("out/round/**/replies.jsonl"))


def wait_until_gone(word: str) -> bool:
    deadline = time.monotonic() + 10
    while processes_with(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("launched", [False, True])
def test_a_signal_reaches_the_command_once(model, tmp_path, number, code, launched):
    """The stage stops after its step with a checkpoint, through accelerate's launcher too, and goes on from there."""
    chain = write_chain(tmp_path, model)
    if launched:
        (tmp_path / "cpu.yaml").write_text(
            "{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', use_cpu: true}"
        )
        content = json.loads(chain.read_text())
        content["stages"][0]["accelerate"] = "cpu.yaml"
        chain.write_text(json.dumps(content))
    process = start(chain, "--first.max_steps", "500", "--first.save_steps", "500")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"step +2/", line):
            process.send_signal(number)
            break
    output = "".join(lines) + process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert output.count("stopping after this step") == 1
    assert "stopped by SIG" in output and "at first" in output
    assert len(list((tmp_path / "out" / "first").glob("checkpoint-*/manifest.json"))) == 1
    assert wait_until_gone(str(tmp_path))


def test_a_change_runs_the_stage_and_all_after_it_again(done):
    """Last in this file: it changes the chain of the fixture."""
    chain, _ = done
    out = chain.parent / "out"
    plan = finish(chain, "--dry-run", "--second.learning_rate", "1e-3")
    assert re.search(r"skip +first: done", plan)
    assert re.search(r"replace +second: changed since it was made: key learning_rate", plan)
    plan = finish(chain, "--dry-run", "--first.max_steps", "3")
    assert re.search(r"replace +first: changed since it was made: key max_steps", plan)
    assert re.search(r"replace +second: starts from first", plan)
    plan = finish(chain, "--dry-run", "--seed", "2")
    assert re.search(r"replace +first: changed since it was made: key seed", plan)
    reward = chain.parent / "reward.py"
    reward.write_text(reward.read_text() + "# another file now\n")
    plan = finish(chain, "--dry-run")
    assert f"replace first: changed since it was made: file {reward}:tokens" in plan
    finish(chain, "--until", "first", "--evaluate.eval_dataset_size", "4")
    assert (out / "first.replaced-1" / "manifest.json").exists() and (out / "first" / "manifest.json").exists()
    assert json.loads((out / "first" / "evaluation.json").read_text())["num_rows"] == 4
    assert json.loads((out / "second" / "evaluation.json").read_text())["num_rows"] == 12


def test_a_failing_stage_is_named_with_its_exit_code(model, tmp_path):
    chain = write_chain(tmp_path, model)
    output = finish(chain, "--first.num_generations", "3", code=2)
    assert "r1v-rl grpo: error: " in output
    assert "stage `first` (grpo) ended with exit code 2" in output

"""What a row is trained on: the model's own right chain, else a revision or a further try, else the dataset's, else
nothing; who says that an answer is right; and the processes of a round."""

import os
import signal
import subprocess
import sys
import time

import pytest
from scoring.chat_server import chat_server

from r1v_rl.errors import UserError
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.scorer_config import Score
from r1v_rl.sft.iterate.chains import give_chains, give_scores
from r1v_rl.sft.iterate.children import in_child, run_command
from r1v_rl.sft.iterate.config import Recipe, build_recipe, training_values
from r1v_rl.sft.iterate.judge import AnswerJudge
from r1v_rl.sft.iterate.rounds import check_columns, image_root
from r1v_rl.types import Example

VALUES = {
    "model_name_or_path": "m", "output_dir": "o", "dataset_name": "d", "scorer": "x.py:f", "answer_kind": "text",
    "bf16": False, "use_cpu": True,
}  # fmt: skip


def recipe(**keys) -> Recipe:
    return build_recipe({**VALUES, **keys})


def example(row_id: str, answer: str | None = "3", **columns) -> Example:
    messages = [{"role": "user", "content": [{"type": "text", "text": f"How many, {row_id}?"}]}]
    return Example(row_id, messages, (), answer, {"id": row_id, "answer": answer, **columns})


def record(row_id: str, correct: bool | None, text: str = "own", **fields) -> dict:
    return {
        "id": row_id, "opens_think": True, "completion": text, "num_tokens": 5, "is_truncated": False,
        "correct": correct, "parsed_answer": None, "verdict": "wrong", "judge_problem": "", "resampled": None,
        "num_resamples": 2, **fields,
    }  # fmt: skip


@pytest.fixture
def store(tmp_path):
    with ReplyStore(tmp_path / "replies.jsonl") as store:
        yield store


# --- chains ---------------------------------------------------------------------------------------------------------


def test_without_a_reviser_a_further_try_then_the_datasets_chain_then_none(store):
    examples = [example(i, completion="dataset's") for i in "abcd"] + [example("e"), example("f"), example("g")]
    records = [
        record("a", True),
        record("b", False, resampled="again"),
        record("c", False),
        record("d", True, is_truncated=True),
        record("e", False),
        record("f", None, verdict="unparsable"),
        record("g", True, is_truncated=True, resampled="again"),
    ]
    give_chains(examples, records, recipe(), store)
    assert [(r["chain"], r["source"]) for r in records] == [
        ("own", "own"), ("again", "resampled"), ("dataset's", "dataset"), ("dataset's", "dataset"), (None, "none"),
        (None, "none"), ("again", "resampled"),
    ]  # fmt: skip
    assert records[4]["problem"] == "2 further tries were not right; the dataset has no `completion` for it"
    assert records[5]["problem"] == "gold '3': unparsable"


def test_a_reviser_sees_question_chain_and_gold_and_its_chain_must_be_right(store):
    def revise(text, tries):
        if "How many, b?" in text:
            return "<think>Again.</think>\n\\boxed{3}"
        return "<think>Again.</think>\n\\boxed{4}" if "How many, c?" in text else "No."

    examples = [example("a"), example("b"), example("c", completion="dataset's"), example("d")]
    records = [record("a", True), *[record(i, False, f"wrong {i}</think>\\boxed{{9}}") for i in "bcd"]]
    with chat_server(revise) as server:
        keys = {"reviser_model": "r", "reviser_base_url": server.base_url}
        give_chains(examples, records, recipe(**keys), store)
    assert [(r["chain"], r["source"]) for r in records] == [
        ("own", "own"), ("Again.</think>\n\\boxed{3}", "revised"), ("dataset's", "dataset"), (None, "none"),
    ]  # fmt: skip
    assert records[2]["problem"] == "the revision is not right: '4'"
    assert records[3]["problem"].startswith("the revision has no think block")
    assert len(server.asked) == 3 and set(server.asked.values()) == {1}
    (shown,) = [text for text in server.asked if "How many, c?" in text]
    assert "Correct final answer: 3" in shown and "<think>wrong c</think>\\boxed{9}" in shown


def test_the_chain_that_stands_is_what_is_scored(store):
    records = [record("a", True), record("b", False), record("c", False, resampled="again")]
    examples = [example(i) for i in "abc"]
    give_chains(examples, records, recipe(), store)
    seen = []

    def scorer(answers, _):
        seen.extend((answer.example.id, answer.completion, answer.response) for answer in answers)
        return [Score(4), Score(None, "hm")]

    give_scores(examples, records, scorer, store)
    assert seen == [("a", "own", "<think>own"), ("c", "again", "<think>again")]
    assert [r["score"] for r in records] == [4, None, None] and records[2]["problem"] == "hm"


# --- who is right ---------------------------------------------------------------------------------------------------


def test_the_judge_is_asked_only_where_the_rules_do_not_accept_and_sees_the_answer_alone(store):
    def same(text, tries):
        assert "secret" not in text, "the chain is not shown"
        return "Same: yes" if "three" in text else "hm" if "Answer of a student" in text and "9" in text else "Same: no"

    examples = [example(i) for i in "abcde"] + [example("f", answer=None)]
    texts = [rf"secret</think>\boxed{{{answer}}}" for answer in ("3", "three", "4", "9")] + ["secret</think>", "x"]
    with chat_server(same) as server:
        keys = {"answer_judge": "llm", "judge_model": "j", "judge_base_url": server.base_url}
        verdicts, problems = AnswerJudge(recipe(**keys), store)(examples, texts, [True] * 6)
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False, False, None]
    assert [bool(problem) for problem in problems] == [False, False, False, True, False, False]
    assert sum(server.asked.values()) == 3


def test_by_rules_alone_nobody_is_asked(store):
    verdicts, problems = AnswerJudge(recipe(), store)([example("a")], [r"x</think>\boxed{three}"], [True])
    assert verdicts[0].correct is False and problems == [""]


# --- recipe and files -----------------------------------------------------------------------------------------------


def test_the_training_gets_its_own_keys_and_no_others():
    values = {**VALUES, "seed": 3, "packing": True, "max_length": 64, "taus": [2], "judge_model": "j"}
    values |= {"max_image_tiles": 2, "dataset_size": 7, "system_prompt": "s", "dataset_kwargs": {"a": 1}}
    kept = training_values(values)
    assert kept == {
        "model_name_or_path": "m", "output_dir": "o", "bf16": False, "use_cpu": True, "seed": 3, "packing": True,
        "max_length": 64, "max_image_tiles": 2,
    }  # fmt: skip


def test_image_paths_start_where_the_datasets_did(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    assert image_root({"dataset_name": str(tmp_path / "rows.jsonl")}) == str(tmp_path)
    assert image_root({"dataset_name": str(tmp_path)}) == str(tmp_path)
    assert image_root({"dataset_name": "scenes"}) is None
    assert image_root({"dataset_name": "scenes", "dataset_root": str(tmp_path)}) == str(tmp_path)


def test_a_column_that_parquet_cannot_hold_is_named_before_anything_runs():
    check_columns([example("a", level=1), example("b", level=None)])
    with pytest.raises(UserError, match="column `level` of the dataset mixes values"):
        check_columns([example("a", level=1), example("b", level="hard")])


# --- processes ------------------------------------------------------------------------------------------------------


def raise_mistake():
    raise UserError("a mistake")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_childs_mistake_is_the_commands_and_its_death_a_fault():
    with pytest.raises(UserError, match="a mistake"):
        in_child(raise_mistake)
    with pytest.raises(RuntimeError, match="process of die ended with exit code -9"):
        in_child(die)
    assert in_child(time.sleep, 0) is None


def test_a_command_has_a_shells_exit_code():
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def test_no_child_outlives_a_killed_parent(tmp_path):
    """Else it would train on in the folder that the resumed run trains in."""
    script = tmp_path / "child.py"
    script.write_text("import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n")
    code = "import sys; from r1v_rl.sft.iterate.children import run_command; run_command(sys.argv[1:])"
    command = [sys.executable, "-c", code, sys.executable, str(script), str(tmp_path / "up")]
    with subprocess.Popen(command) as parent:
        until = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        parent.kill()
    time.sleep(0.5)
    left = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True, check=False).stdout
    assert not left.strip()

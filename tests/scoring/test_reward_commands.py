"""`judge`, `reward-check` and `rescore` as a user meets them."""

import json

import pyarrow.parquet as pq
import pytest

from r1v_rl import cli
from r1v_rl.tracking.completions import CompletionRecord, RolloutStore

GOOD = "<think>2 and 3 make 5</think> \\boxed{5}"


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("command", ["judge", "reward-check", "rescore"])
def test_help_lists_the_keys(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0 and "--answer_kind" in capsys.readouterr().out


def test_judge_grades_every_row_and_counts_reasons(tmp_path, capsys):
    source = write(
        tmp_path / "rows.jsonl",
        {"id": 1, "gold": "5", "completion": GOOD},
        {"id": 2, "answer": "5", "completion": [{"role": "assistant", "content": "\\boxed{6}"}]},
        {"id": 3, "gold": "B", "completion": "\\boxed{(B) red}", "answer_kind": "choice", "choices": ["blue", "red"]},
        {"id": 4, "gold": "5", "completion": "no idea at all here, sorry"},
        {"id": 5, "gold": "5", "completion": "\\boxed{9^{9^{9^9}}}"},
        {"id": 6, "gold": "\\frac{", "completion": "\\boxed{x+\\ln 2}"},
    )
    assert cli.main(["judge", source, "--reward_timeout_s", "0.5"]) == 0
    judged = [json.loads(line) for line in (tmp_path / "rows.judged.jsonl").read_text().splitlines()]
    assert [row["id"] for row in judged] == [1, 2, 3, 4, 5, 6]
    assert [judged[1]["gold"], judged[1]["answer"]] == ["5", "6"]  # to judge the output again says the same
    assert [row["correct"] for row in judged] == [True, False, True, False, False, None]
    assert [row["reason"] for row in judged] == ["right", "wrong", "right", "no answer", "timeout", "unparsable"]
    printed = capsys.readouterr().out
    assert "right 2, wrong 1, no answer 1, unparsable 1, timeout 1" in printed and "accuracy 0.4000 of 5" in printed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{nonsense\n", r"rows.jsonl:2 must be a JSON object"),
        ("[1]\n", r"rows.jsonl:2 must be a JSON object; received list"),
        ({"completion": "5"}, "rows.jsonl:2 must have `gold`"),
        ({"gold": "5"}, "text `completion`; it has gold"),
        ({"gold": "5", "completion": "5", "answer_kind": "maths"}, "rows.jsonl:2: answer_kind must be one of"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, capsys, row, message):
    source = write(tmp_path / "rows.jsonl", {"gold": "5", "completion": GOOD}, row)
    assert cli.main(["judge", source]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.judged.jsonl").exists()


@pytest.mark.parametrize("kind", ["math", "number", "choice", "text"])
def test_reward_check_finds_no_fault_in_the_shipped_rewards(kind, capsys):
    assert cli.main(["reward-check", "--answer_kind", kind, "--reward_weights", "0.8", "0.2"]) == 0
    assert "0 faults" in capsys.readouterr().out


def test_reward_check_finds_what_can_be_gamed(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "def contains(completions, answer, **_):\n"
        "    return [float(a in c[0]['content']) for c, a in zip(completions, answer)]\n"
    )
    data = write(tmp_path / "rows.jsonl", {"id": "row-7", "problem": "2+3?", "answer": "5"})
    assert cli.main(["reward-check", "--reward_funcs", f"{file}:contains", "--dataset_name", data]) == 2
    printed = capsys.readouterr().out
    for name in ("gold in prose", "box in the reasoning", "several boxes", "gold, then another"):
        assert f"row row-7, {name}: earns 1.000, no less than the gold's 1.000" in printed
    assert "row row-7, wrong answer" not in printed


def test_rescore_applies_other_rewards_to_what_is_stored(tmp_path, capsys):
    store = RolloutStore(tmp_path)
    for step, texts in enumerate((("\\boxed{5}", GOOD), ("\\boxed{6}", "long " * 9))):
        store.write(
            step,
            [
                CompletionRecord(
                    example_id=f"row-{i}", prompt="2+3?", completion=text, token_ids=range(len(text)), logprobs=[],
                    rewards={"accuracy": 0.0}, reward=0.0, advantage=0.0, weight_version=step, is_truncated=False,
                    gold="5",
                )
                for i, text in enumerate(texts)
            ],
        )  # fmt: skip
    arguments = ["rescore", str(tmp_path), "--reward_funcs", "accuracy", "format", "--reward_weights", "0.8", "0.2"]
    assert cli.main(arguments) == 0
    table = pq.read_table(tmp_path / "rescored.parquet")
    assert table["rescored/accuracy"].to_pylist() == [1.0, 1.0, 0.0, 0.0]
    assert table["rescored"].to_pylist() == pytest.approx([0.8, 1.0, 0.0, 0.0])
    assert table["verdict"].to_pylist() == ["right", "right", "wrong", "no answer"]
    assert table["rewards/accuracy"].to_pylist() == [0.0] * 4
    assert "accuracy                        0.0000    0.5000         2" in capsys.readouterr().out
    assert cli.main(["rescore", str(tmp_path / "nowhere")]) == 2

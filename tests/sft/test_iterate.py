"""Rounds from the command line on a random tiny model: what they leave, and that a kill costs nothing twice."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from random_vlm import save_random_vlm
from scoring.chat_server import chat_server
from sft.iterate_run import RECIPE, ROOT, rows_of, run

from r1v_rl.data.dataset import load_examples
from r1v_rl.tracking.metrics import read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"), max_tiles=1)


def judge(text: str, tries: int) -> str:
    """A judge and a reviser: always the same reply to the same question, and now and then none that can be read."""
    gold = re.search(r"Correct final answer: (.*)", text)[1]
    if "mend what went wrong" in text:
        unusable = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 4 == 0
        return "I cannot." if unusable else f"<think>Look again.</think>\n\\boxed{{{gold}}}"
    number = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 7
    return f"Score: {number}" if number < 6 else "It is a fine solution."


# --- a rule as the scorer, the dataset's own chains ------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_rule(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_rule")
    finished = run(
        folder,
        model_name_or_path=str(model),
        scorer="rewards/scene_scores.py:scene_scores",
        dataset_kwargs={"chains": "mixed"},
        num_resamples=1,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "out", finished.stdout


def test_two_rounds_leave_a_stage_folder(by_rule, model):
    out, printed = by_rule
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "iterate" and manifest["parent"]["path"] == str(model)
    assert [r["tau"] for r in manifest["metrics"]["rounds"]] == [2, 4]
    first, second = (json.loads((out / f"round-{t}/model/manifest.json").read_text()) for t in (1, 2))
    assert second["parent"]["path"] == str(out / "round-1/model")
    assert manifest["weight_hashes"] == second["weight_hashes"]
    for part in ("vision_encoder", "language_model"):
        assert first["weight_hashes"][part] == second["weight_hashes"][part], "frozen"
    assert first["weight_hashes"]["projector"] != second["weight_hashes"]["projector"]
    for name in ("config.yaml", "metrics.jsonl", "report.html", "config.json", "chat_template.jinja"):
        assert (out / name).exists(), name
    assert (out / "model.safetensors").read_bytes() == (out / "round-2/model/model.safetensors").read_bytes()
    rates = [yaml.safe_load((out / f"round-{t}/sft.yaml").read_text())["learning_rate"] for t in (1, 2)]
    assert rates == [1e-3, 1e-4]
    steps = [line["step"] for line in read_metrics(out) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "steps are counted on from round to round"
    assert printed.count("round  tau  learning_rate  rows  right  wrong") == 3


def test_a_selection_is_a_dataset_with_a_reason_and_a_score_in_every_row(by_rule):
    out, _ = by_rule
    for t, tau in ((1, 2), (2, 4)):
        answers = rows_of(out / f"round-{t}/answers.parquet")
        selection = rows_of(out / f"round-{t}/selection.parquet")
        assert len(answers) == 12 and [row["id"] for row in selection] == [r["id"] for r in answers if r["selected"]]
        assert all(row["reason"] for row in answers)
        assert not any(row["correct"] for row in answers), "a random model is never right"
        for row in selection:
            assert row["chain_source"] == "dataset" and row["score"] in (2, 5)
            assert ("and answered wrongly" in row["reason"]) == (row["score"] >= tau)
        examples = load_examples(str(out / f"round-{t}/selection.parquet"))
        assert [len(example.images) for example in examples] == [len(row["images"]) for row in selection]
        assert examples[0].columns["completion"] == selection[0]["completion"]
        assert examples[0].columns["scene"], "the dataset's own columns come along"
    source = {e.id: e for e in load_examples("scenes", dataset_size=12, dataset_kwargs={"chains": "mixed"}, seed=5)}
    for example in examples:
        assert example.messages == source[example.id].messages and example.answer == source[example.id].answer


def test_the_top_scored_rows_go_to_grpo(by_rule):
    out, printed = by_rule
    top = load_examples(str(out / "top_score.parquet"))
    last = [row["id"] for row in rows_of(out / "round-2/answers.parquet") if row["score"] == 5]
    assert [example.id for example in top] == last and 0 < len(last) < 12
    assert f"{len(last)} rows with score 5" in printed


def test_a_finished_run_does_nothing_again(by_rule, model):
    out, _ = by_rule
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "config.yaml"}
    keys = {"scorer": "rewards/scene_scores.py:scene_scores", "dataset_kwargs": {"chains": "mixed"}}
    finished = run(out.parent, model_name_or_path=str(model), num_resamples=1, **keys)
    assert finished.returncode == 0 and "is complete" in finished.stdout
    changed = [p for p, at in before.items() if p.is_file() and p.name != "state.json" and p.stat().st_mtime_ns != at]
    assert not changed
    other = run(out.parent, model_name_or_path=str(model), num_resamples=2, **keys)
    assert other.returncode == 2 and "`num_resamples` was 1, is 2" in other.stderr
    assert "Traceback" not in other.stderr


# --- a chat model as judge and reviser, killed -----------------------------------------------------------------------

FAULTS = [
    ("file_write:5", "answering: the third part is written, not yet in place"),
    ("reply_write:11", "revising: two replies are on the disk, the third is written"),
    ("file_write:7", "the round's files: the answers are in place, the selection is not"),
    ("checkpoint_write:9", "training: in the middle of a save"),
    ("round_trained:1", "round 1 is trained, nothing of round 2 begun"),
]


def judged(folder: Path, model: Path, server, fault: str = "") -> subprocess.CompletedProcess:
    keys = {"scorer": "rubric", "judge_model": "judge", "reviser_model": "reviser", "judge_concurrency": 1}
    return run(folder, fault=fault, model_name_or_path=str(model), judge_base_url=server.base_url, **keys)


def test_killed_at_any_point_no_judge_is_asked_twice_and_nothing_trains_twice(model, tmp_path):
    with chat_server(judge) as server:
        whole = judged(mkdir(tmp_path / "whole"), model, server)
        assert whole.returncode == 0, whole.stdout + whole.stderr
        asked = dict(server.asked)
    assert set(asked.values()) == {1} and len(asked) > 12

    folder = mkdir(tmp_path / "killed")
    trained_at = None
    with chat_server(judge) as server:
        for fault, moment in FAULTS:
            killed = judged(folder, model, server, fault)
            assert killed.returncode not in (0, 2), f"{moment}: {killed.stdout} {killed.stderr}"
            if fault.startswith("round_trained"):
                trained_at = (folder / "out/round-1/model/manifest.json").stat().st_mtime_ns
        finished = judged(folder, model, server)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert dict(server.asked) == asked, "the same questions, each once"
    assert (folder / "out/round-1/model/manifest.json").stat().st_mtime_ns == trained_at
    for name in ("round-1/selection", "round-2/selection", "round-1/answers", "round-2/answers", "top_score"):
        assert rows_of(folder / f"out/{name}.parquet") == rows_of(tmp_path / f"whole/out/{name}.parquet"), name
    hashes = [json.loads((f / "out/manifest.json").read_text())["weight_hashes"] for f in (folder, tmp_path / "whole")]
    assert hashes[0] == hashes[1]

    answers = rows_of(folder / "out/round-1/answers.parquet")
    dropped = [row for row in answers if row["chain"] is None]
    assert dropped and all("the revision has no think block" in row["reason"] for row in dropped)
    assert {row["chain_source"] for row in answers} == {"revised", "none"}
    unscored = [row for row in answers if row["chain"] and row["score"] is None]
    assert unscored, "a reply without a score is no score"
    assert f"{len(unscored)} chain(s) that cannot be scored: {unscored[0]['id']}: no score in the reply" in whole.stdout


def mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def test_ctrl_c_while_it_trains_leaves_a_checkpoint_and_no_process(model, tmp_path):
    """The signal goes to the command alone, as `kill` sends it; the training ends by itself and is gone on with."""
    keys = {**RECIPE, "output_dir": str(tmp_path / "out"), "model_name_or_path": str(model), "num_resamples": 0}
    keys |= {"scorer": "rewards/scene_scores.py:scene_scores", "dataset_kwargs": {"chains": "careful"}}
    keys |= {"num_train_epochs": 200, "taus": [5], "learning_rates": [1e-3], "save_steps": 1000}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "r1v_rl", "iterate", "--config", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        metrics, until = tmp_path / "out/round-1/model/metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert list((tmp_path / "out/round-1/model").glob("checkpoint-*/manifest.json"))
    assert not (tmp_path / "out/round-1/model/manifest.json").exists()
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert not left.strip()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": 1e-4}, "`learning_rate` is set by each round: `learning_rates`"),
        ({"taus": [2]}, "one entry for each round; received 1 and 2"),
        ({"taus": [2, 6]}, "whole numbers from 0 to 5"),
        ({"use_peft": True}, "`use_peft` must be false"),
        ({"scorer": "rubric"}, "needs `judge_model`"),
        ({"scorer": "nowhere.py:f"}, "nowhere.py"),
        ({"judge_modle": "x"}, "Did you mean `judge_model`"),
        ({"eval_strategy": "epoch", "instruction": "Count."}, "leave out `eval_strategy`"),
        (
            {
                "contamination_check": "refuse",
                "eval_dataset_name": "scenes",
                "eval_dataset_split": "train",
                "eval_dataset_size": 12,
                "eval_dataset_kwargs": {"num_images": 1},
            },
            "12 of 12 training rows overlap with",
        ),
        ({"model_name_or_path": None}, "must set `model_name_or_path`"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(model, tmp_path, keys, message, monkeypatch, capsys):
    from r1v_rl.cli import main

    monkeypatch.chdir(ROOT)
    defaults = {"model_name_or_path": str(model), "scorer": "rewards/scene_scores.py:scene_scores"}
    recipe = {**RECIPE, **defaults, "output_dir": str(tmp_path / "out"), **keys}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v is not None}))
    assert main(["iterate", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err

"""`r1v-rl evaluate` on a tiny random model: what it measures, what it keeps, what it refuses."""

import json
from contextlib import closing

import pytest
from random_vlm import save_random_vlm

from r1v_rl import cli
from r1v_rl.config import DataConfig
from r1v_rl.evaluate.answer_file import AnswerFile
from r1v_rl.evaluate.heldout import EvaluationConfig, evaluate_model
from r1v_rl.evaluate.record import begin, files_of, read_evaluation
from r1v_rl.rollout.hf import TransformersEngine

KEYS = {
    "eval_dataset_name": "scenes", "eval_dataset_size": 6, "eval_dataset_kwargs": {"num_images": 1},
    "text_dataset_name": "scenes", "text_dataset_size": 4, "text_dataset_kwargs": {"num_images": 0},
    "max_completion_length": 5, "use_vllm": False, "answer_kind": "text", "per_device_eval_batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_random_vlm(tmp_path_factory.mktemp("model")))


def test_what_is_measured(model, monkeypatch):
    seen = []
    generate = TransformersEngine.generate

    def spy(engine, prompts, sampling, *, seed):
        seen.extend(picture.getextrema() for prompt in prompts for picture in prompt.images)
        return generate(engine, prompts, sampling, seed=seed)

    monkeypatch.setattr(TransformersEngine, "generate", spy)
    found, answers = evaluate_model(EvaluationConfig(model_name_or_path=model, **KEYS), DataConfig())
    assert [row["set"] for row in answers] == ["pictures"] * 6 + ["blank"] * 6 + ["text"] * 4
    assert [low == high for extrema in seen for low, high in extrema] == [False] * 18 + [True] * 18
    assert found["mean_length"] == sum(row["num_tokens"] for row in answers[:6]) / 6
    assert found["accuracy"]["value"] == sum(row["correct"] is True for row in answers[:6]) / 6
    assert found["num_rows"] == 6 and found["truncated_frac"] == 1.0 and found["format_rate"] == 0.0


def test_the_format_is_that_of_the_reward(model):
    config = EvaluationConfig(model_name_or_path=model, **KEYS, format_pattern=".")
    found, _ = evaluate_model(config, DataConfig())
    assert found["format_rate"] == 1.0


def test_several_answers_a_row(model):
    config = EvaluationConfig(model_name_or_path=model, **KEYS, num_generations=3, temperature=1.0, blank_images=False)
    found, answers = evaluate_model(config, DataConfig())
    assert [row["id"] for row in answers[:6]] == [answers[0]["id"]] * 3 + [answers[3]["id"]] * 3
    assert len({row["completion"] for row in answers}) > 10 and "blank_accuracy" not in found


def test_the_command_leaves_a_record_that_is_found_again(tmp_path, capsys):
    """It belongs to the model's manifest and to the keys it was made with."""
    folder = save_random_vlm(tmp_path / "model")
    (folder / "manifest.json").write_text('{"stage": "sft"}')
    words = [word for key, value in KEYS.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    assert cli.main(["evaluate", "--model_name_or_path", str(folder), *words]) == 0
    assert "with pictures" in capsys.readouterr().out
    assert len((folder / "evaluation.jsonl").read_text().splitlines()) == 16
    assert read_evaluation(folder, KEYS)["num_rows"] == 6
    assert read_evaluation(folder, {**KEYS, "seed": 1}) is None
    (folder / "manifest.json").write_text('{"stage": "grpo"}')
    assert read_evaluation(folder, KEYS) is None


def test_corrected_rows_are_asked_again(tmp_path, model, capsys):
    """An evaluation of other rows is no record, and nothing to go on with."""
    rows = tmp_path / "rows.jsonl"
    keys = {"eval_dataset_name": str(rows), "max_completion_length": 2, "use_vllm": False, "blank_images": False}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    words = ["evaluate", "--model_name_or_path", model, "--output_dir", str(tmp_path), *words]
    for answer in ("1", "2"):
        rows.write_text(json.dumps({"id": "a", "problem": "What is 1 + 1?", "answer": answer}) + "\n")
        if answer == "2":
            assert json.loads((tmp_path / "evaluation.json").read_text())["files"] != files_of(keys, tmp_path)
            assert cli.main([*words, "--resume", "true"]) == 2
            assert "are of another run: the rows are other ones" in capsys.readouterr().err
        assert cli.main(words) == 0
        assert json.loads((tmp_path / "evaluation.jsonl").read_text())["gold"] == answer


def test_answers_stay_where_only_what_runs_write_has_changed(tmp_path):
    """A root of pictures above the evaluation's folder holds its own files; an earlier version kept no fingerprints."""
    values = {"dataset_root": str(tmp_path), "eval_dataset_name": "scenes", "model_name_or_path": "m"}
    folder = tmp_path / "out"
    with closing(AnswerFile(folder / "evaluation.jsonl")) as answers:
        begin(folder, values, None, answers)
        answers.append([{"set": "pictures", "id": "a", "sample": 0}])
    for change in ("log", "version"):
        if change == "log":
            (tmp_path / "run.log").write_text("longer")
        else:
            state = json.loads((folder / "evaluation.state.json").read_text())
            del state["files"]
            (folder / "evaluation.state.json").write_text(json.dumps(state))
        with closing(AnswerFile(folder / "evaluation.jsonl")) as answers:
            begin(folder, values, True, answers)
        assert (folder / "evaluation.jsonl").read_text()


def test_a_second_evaluation_leaves_the_answers_of_a_running_one(tmp_path, model, capsys):
    running = AnswerFile(tmp_path / "evaluation.jsonl")
    running.append([{"set": "pictures", "id": "a", "sample": 0}])
    words = [word for key, value in KEYS.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    assert cli.main(["evaluate", "--model_name_or_path", model, "--output_dir", str(tmp_path), *words]) == 2
    assert "is in use by another evaluation" in capsys.readouterr().err
    assert len((tmp_path / "evaluation.jsonl").read_text().splitlines()) == 1
    running.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs `eval_dataset_name`"),
        (["--eval_dataset_name", "scenes"], "needs `model_name_or_path`"),
        (
            ["--eval_dataset_name", "scenes", "--num_generations", "2"],
            "`num_generations` must be 1 where",
        ),
        (["--eval_dataset_name", "scenes", "--modle", "x"], "`modle` is not a recipe key"),
    ],
)
def test_what_is_refused(words, message, capsys):
    assert cli.main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err

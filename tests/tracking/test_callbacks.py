"""Metrics file and console under a real `transformers.Trainer`, through resumes and torn files."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from r1v_rl.tracking.callbacks import ConsoleProgress, drop_default_console, tracking_callbacks
from r1v_rl.tracking.metrics import json_value, progress_line, read_metrics


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


class StopAt(TrainerCallback):
    """Ends the run after a step, as a kill after its logs were written would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def make_trainer(output_dir, *callbacks, report_to=(), **kwargs):
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=6,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=list(report_to),
        **kwargs,
    )
    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(8)]
    trainer = Trainer(Line(), args, train_dataset=rows, callbacks=[*tracking_callbacks(args), *callbacks])
    drop_default_console(trainer)
    return trainer


def logged_steps(output_dir):
    return [line["step"] for line in read_metrics(output_dir) if "loss" in line]


def test_one_json_line_a_step_and_the_summary(tmp_path):
    make_trainer(tmp_path).train()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert all(math.isfinite(line["loss"]) and line["epoch"] is not None for line in lines[:-1])
    assert "train_runtime" in lines[-1]


def test_a_resume_drops_the_lines_it_writes_again_and_a_torn_one(tmp_path):
    make_trainer(tmp_path, StopAt(5)).train()
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.1')
    before = read_metrics(tmp_path)[:4]
    make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path)[:4] == before
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text)


def test_a_fresh_run_drops_an_earlier_run_but_keeps_its_own_lines_from_before_training(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "reward": "of another run"}\n')
    trainer = make_trainer(tmp_path)
    trainer.log({"eval_accuracy": 0.25})
    trainer.train()
    lines = read_metrics(tmp_path)
    assert (lines[0]["step"], lines[0]["eval_accuracy"]) == (0, 0.25)
    assert all("reward" not in line for line in lines)


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    trainer = make_trainer(tmp_path)
    expected = {"nan": None, "inf": None, "tensor": 0.5, "numpy": 2.0, "none": None}
    trainer.log({"nan": math.nan, "inf": -math.inf, "tensor": torch.tensor(0.5), "numpy": np.float32(2), "none": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {key: line[key] for key in expected} == expected
    assert json_value({"a": (1, [math.nan])}) == {"a": [1, [None]]}


def test_console_shows_one_readable_line_a_step_and_no_other(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    assert [type(c) for c in trainer.callback_handler.callbacks].count(ConsoleProgress) == 1
    capsys.readouterr()
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("step 1/6  loss ") and "train_runtime" in lines[-1]


def test_no_console_at_all_when_the_recipe_says_so(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=True)
    capsys.readouterr()
    trainer.train()
    captured = capsys.readouterr()
    assert captured.out == "" and "loss" not in captured.err
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_progress_line_by_hand():
    logs = {
        "loss": 0.01234,
        "reward": 0.5,
        "rewards/accuracy_reward/mean": 0.375,
        "rewards/accuracy_reward/std": 0.1,
        "rewards/format/mean": math.nan,
        "completions/mean_length": 120.6,
        "completions/clipped_ratio": 0.125,
        "step_time": 3.25,
    }
    assert progress_line(7, 200, logs) == (
        "step   7/200  loss 0.0123  reward 0.500  accuracy 0.375  tokens 121  cut 12%  seconds 3.2"
    )


def test_no_value_steers_the_terminal():
    assert progress_line(1, 2, {"note": "a\x1b[2Jb\nc\u202e"}) == "step 1/2  note a\\x1b[2Jb c\\u202e"

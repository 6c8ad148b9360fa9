"""Rounds whose chains `distill` makes: each question is assessed once, wrong rows are trained on as revised."""

import hashlib
import json
import re

import pytest
import yaml
from distill.distill_run import assessment
from random_vlm import save_random_vlm
from scoring.chat_server import chat_server
from sft.iterate_run import rows_of, run

DISTILL = {
    "judge_model": "judge", "reviser_model": "teacher", "ablation": False, "num_generations": 1, "temperature": 0.0,
    "use_vllm": False, "dtype": "float32", "max_completion_length": 16, "answer_kind": "text", "num_revisions": 1,
    "dataset_size": 3, "model_name_or_path": "another",
}  # fmt: skip


def reply(text: str, _: int) -> str:
    """A judge of questions, and a teacher that knows every answer."""
    if gold := re.search(r"Correct final answer: (.*)", text):
        return f"<think>Look at each of them again.</think>\n\\boxed{{{gold[1]}}}"
    return assessment(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 6)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """(output folder, the server, with what it was asked)"""
    folder = tmp_path_factory.mktemp("rounds")
    model = save_random_vlm(folder / "model", max_tiles=1)
    (folder / "full.py").write_text("def full(completions, **_):\n    return [5] * len(completions)\n")
    with chat_server(reply) as server:
        recipe = {**DISTILL, "judge_base_url": server.base_url}
        (folder / "distill.yaml").write_text(yaml.safe_dump(recipe))
        finished = run(
            folder,
            model_name_or_path=str(model),
            scorer=f"{folder / 'full.py'}:full",
            dataset_size=6,
            timeout_s=580,
            distill_recipe=str(folder / "distill.yaml"),
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "out", server


def test_the_rounds_own_rows_and_model_are_distilled(rounds):
    out, _ = rounds
    for number, writer in ((1, out.parent / "model"), (2, out / "round-1/model")):
        manifest = json.loads((out / f"round-{number}/distill/manifest.json").read_text())
        assert manifest["parent"]["path"] == str(writer) and manifest["metrics"]["rows"] == 6
        answers = rows_of(out / f"round-{number}/answers.parquet")
        assert {row["chain_source"] for row in answers} == {"revised"} and not any(row["correct"] for row in answers)
        assert all(row["selected"] and "answered wrongly" in row["reason"] for row in answers)
        assert len(rows_of(out / f"round-{number}/selection.parquet")) == 6


def test_a_question_is_assessed_once_over_all_rounds(rounds):
    _, server = rounds
    assessed = [request for request in server.requests if "response_format" in request]
    assert len(assessed) == 6
    revised = {text: n for text, n in server.asked.items() if "Correct final answer" in text}
    assert set(revised.values()) == {1}, "a chain that did not change is not revised again"

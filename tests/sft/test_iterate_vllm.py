"""Rounds against vLLM: its server as the judge, its engine in process as the one that answers."""

import pytest
import yaml
from random_vlm import save_random_vlm
from sft.iterate_run import ROOT, rows_of, run
from tiny_server import tiny_server

from r1v_rl.scoring.judge_config import WorkedAnswer
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.scorer_config import ScorerConfig
from r1v_rl.scoring.scorers import make_scorer
from r1v_rl.types import Example


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"), max_tiles=1)


def test_a_round_judged_by_vllms_server(model, tmp_path):
    """The tiny model knows nothing of grading: in the round, what it may say is fixed and which of it is its choice.
    Left to speak freely, it says nothing that is a score."""
    choices = [f"Score: {i}" for i in range(6)]
    rubric = {
        "rubric": "How many points for this? {question} {response}",
        "judge_model": "judge",
        "judge_images": False,
    }
    bound = {"temperature": 0, "max_completion_tokens": 8, "extra_body": {"structured_outputs": {"choice": choices}}}
    keys = {"dataset_kwargs": {"chains": "careful"}, "dataset_size": 8, "num_resamples": 0, "taus": [5]}
    with tiny_server(tmp_path / "server.log") as url:
        asking = {**rubric, "judge_base_url": url}
        finished = run(
            tmp_path, **keys, **asking, judge_kwargs=bound, learning_rates=[1e-3], model_name_or_path=str(model)
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        messages = [{"role": "user", "content": [{"type": "text", "text": "How many circles are there?"}]}]
        answer = WorkedAnswer(Example("row", messages, (), "3", {}), "About", "<think>About")
        with ReplyStore(tmp_path / "free.jsonl") as store:
            config = ScorerConfig(**asking, judge_kwargs={"temperature": 0, "max_completion_tokens": 8})
            (free,) = make_scorer(config)([answer], store)
    scores = [row["score"] for row in rows_of(tmp_path / "out/round-1/answers.parquet")]
    assert len(scores) == 8 and set(scores) <= set(range(6))
    assert free.value is None and free.problem.startswith("no score in the reply")


def test_the_tiny_recipe_answers_with_vllm(model, tmp_path):
    recipe = yaml.safe_load((ROOT / "recipes/tiny/iterate.yaml").read_text())
    recipe |= {"model_name_or_path": str(model), "dataset_size": 12, "taus": [5], "learning_rates": [1e-3]}
    finished = run(
        tmp_path,
        **recipe | {"max_completion_length": 16, "generation_batch_size": 8, "output_dir": str(tmp_path / "out")},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    answers = rows_of(tmp_path / "out/round-1/answers.parquet")
    assert len(answers) == 12 and all(0 < row["num_tokens"] <= 16 for row in answers)
    assert {row["chain_source"] for row in answers} <= {"dataset", "resampled", "own"}

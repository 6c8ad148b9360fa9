"""Rounds against vLLM: its server as the judge, its engine in process as the one that answers."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import yaml
from random_vlm import save_random_vlm
from sft.iterate_run import ROOT, rows_of, run

from r1v_rl.runtime import children_prepared
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.scorers import ScorerConfig, WorkedAnswer, make_scorer
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.types import Example

START_S = 240


@contextmanager
def vllm_server(log):
    """vLLM's OpenAI-compatible server with the tiny reasoning LLM; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_part("tiny/reasoning_llm")),
        "--served-model-name", "judge", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1",
        "--port", str(port), "--max-model-len", "1024",
    ]  # fmt: skip
    with children_prepared(), open(log, "w") as output:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        until = time.monotonic() + START_S
        while not _is_up(port):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


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
    with vllm_server(tmp_path / "server.log") as url:
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

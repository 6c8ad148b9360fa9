"""`r1v-rl evaluate` on benchmarks with a tiny random model: protocol, files, resume after kills, comparisons."""

import json
import os
import random
import signal
import time

import pytest
import torch
from published_layouts import make_all
from random_vlm import save_random_vlm

from r1v_rl import cli
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.heldout import EvaluationConfig
from r1v_rl.rollout.hf import TransformersEngine

SHORT = ["--use_vllm", "false", "--max_completion_length", "4", "--per_device_eval_batch_size", "2"]
PLAIN = ["--choice_instruction", "", "--open_instruction", ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def evaluate(model, root, tmp_path):
    """evaluate(folder, benchmarks, *words) -> (record, answers)."""

    def run(folder, names, *words):
        keys = ["--model_name_or_path", model, "--output_dir", tmp_path / folder, "--benchmark_root", root]
        assert cli.main(["evaluate", *map(str, keys), "--benchmarks", *names.split(), *SHORT, *PLAIN, *words]) == 0
        text = (tmp_path / folder / "evaluation.jsonl").read_text()
        return json.loads((tmp_path / folder / "evaluation.json").read_text()), list(map(json.loads, text.splitlines()))

    return run


def test_the_papers_protocol_is_the_default():
    config = EvaluationConfig(benchmarks=["scenes"])
    sampling = config.sampling(123)
    assert (sampling.num_generations, sampling.temperature, sampling.top_p) == (5, 0.6, 0.95)
    assert (sampling.repetition_penalty, sampling.max_tokens) == (1.05, 123)
    greedy = EvaluationConfig(benchmarks=["scenes"], greedy=True).sampling(9)
    assert (greedy.num_generations, greedy.temperature, greedy.repetition_penalty) == (1, 0.0, 1.0)
    heldout = EvaluationConfig(eval_dataset_name="scenes").sampling()
    assert (heldout.num_generations, heldout.temperature, heldout.max_tokens) == (1, 0.0, 256)
    assert EvaluationConfig(benchmarks=["scenes"], temperature=0.0).num_generations == 1
    assert "step by step" not in EvaluationConfig(benchmarks=["scenes"], cot=False).instructions().choice


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"benchmarks": ["math5000"]}, "received 'math5000'. Did you mean `math500`"),
        ({"benchmarks": ["scenes"], "eval_dataset_name": "scenes"}, "and not both"),
        ({"benchmarks": ["scenes"], "greedy": True, "num_generations": 5}, "`greedy` is `temperature: 0`"),
        ({"benchmarks": ["scenes"], "compare": ["r1v2"]}, "`compare` must be r1v or the folder of a run"),
        ({"benchmarks": ["scenes"], "answer_judge": "llm"}, "needs `judge_model`"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(RecipeError) as refusal:
        EvaluationConfig(**keys)
    assert message in str(refusal.value)


def test_what_a_run_leaves(evaluate, tmp_path, capsys):
    names = "puzzlevqa mmmu math500 gpqa_diamond"
    record, answers = evaluate("run", names, "--num_generations", "3", "--compare", "r1v")
    assert [row["sample"] for row in answers[:6]] == [0, 1, 2] * 2
    assert len({(row["set"], row["id"], row["sample"]) for row in answers}) == len(answers) == 3 * (2 + 4 + 3 + 6)
    found = record["benchmarks"]["puzzlevqa"]
    assert set(found) >= {"pass@1", "pass@2", "pass@3", "majority", "groups", "mean_tokens"}
    assert found["num_problems"] == 2 and found["max_tokens"] == 4 and found["truncated_frac"] > 0
    table = (tmp_path / "run" / "evaluation.md").read_text()
    assert "| Skywork R1V 38B | 69.0 | 94.0 | 61.6 |" in table and "2 of 2000 problems" in table
    assert "the paper's 64000 are not reached" in table and "MATH-500" in capsys.readouterr().out
    page = (tmp_path / "run" / "evaluation.html").read_text()
    assert page.count("data:image/png") == 2 + 5 and "<script" not in page and "How long is rod" not in page
    assert 'id="set-mmmu"' in page and "#outcome-wrong:checked~.items .item:not(.outcome-wrong)" in page


def test_two_runs_item_by_item(evaluate, tmp_path):
    evaluate("first", "scenes", "--benchmark_size", "6", "--greedy", "true")
    path = tmp_path / "first" / "evaluation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "correct": i < 5}) + "\n" for i, row in enumerate(rows)))
    record, answers = evaluate(
        "second", "scenes", "--benchmark_size", "4", "--greedy", "true", "--compare", str(tmp_path / "first")
    )
    assert not any(row["correct"] for row in answers)
    (test,) = record["compared"]
    assert (test["benchmark"], test["num_problems"], test["only_first"], test["only_second"]) == ("scenes", 4, 0, 4)
    assert test["difference"]["value"] == -1.0 and test["p_value"] == pytest.approx(2 / 16)
    assert "exact McNemar" in (tmp_path / "second" / "evaluation.md").read_text()


def test_one_seed_gives_one_result_and_nothing_is_asked_twice(evaluate, monkeypatch):
    words = ("--num_generations", "2", "--benchmark_size", "5")
    record, answers = evaluate("a", "scenes blindtest", *words)
    again, same = evaluate("b", "scenes blindtest", *words)
    assert answers == same and record["benchmarks"] == again["benchmarks"]
    assert answers != evaluate("c", "scenes blindtest", *words, "--seed", "1")[1]
    monkeypatch.setattr(TransformersEngine, "generate", None)  # everything is there
    assert evaluate("a", "scenes blindtest", *words)[0]["benchmarks"] == record["benchmarks"]


def test_resume_names_what_changed(evaluate, capsys):
    evaluate("a", "blindtest", "--greedy", "true")
    with pytest.raises(AssertionError):
        evaluate("a", "blindtest", "--greedy", "true", "--resume", "true", "--seed", "3")
    assert "are of another run: `seed` was None, is 3; set `resume: false`" in capsys.readouterr().err
    with pytest.raises(AssertionError):
        evaluate("b", "blindtest", "--greedy", "true", "--resume", "true")
    assert "holds no answers to go on with" in capsys.readouterr().err


@pytest.fixture
def one_thread():
    """A forked child has none of its parent's OpenMP threads, and dies where it would use them."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def test_killed_at_ten_random_moments(evaluate, one_thread, tmp_path, monkeypatch):
    """The file ends as that of a run in one go, and no row whose answers were on the disk is asked again."""
    words = ("scenes nlvr_counting", "--num_generations", "2", "--benchmark_size", "16")
    asked, generate = tmp_path / "asked", TransformersEngine.generate

    def noted(engine, prompts, sampling, *, seed):
        with open(asked, "a") as file:
            file.write("".join(f"{prompt.example.id}\n" for prompt in prompts))
        return generate(engine, prompts, sampling, seed=seed)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    whole, _ = evaluate("whole", *words)
    rng, kills = random.Random(0), 0
    path = tmp_path / "killed" / "evaluation.jsonl"
    for attempt in range(40):
        asked.write_text("")
        stored = _whole_chunks(path)
        child = os.fork()
        if child == 0:
            if attempt % 3 == 2 and kills < 10:
                os.environ["R1V_FAULT"] = f"answers_write:{rng.randint(1, 5)}"  # before, in and after a write
            try:
                evaluate("killed", *words)
            finally:
                os._exit(0)
        if attempt % 3 != 2 and kills < 10:
            wanted = rng.randint(0, 3)
            while len(asked.read_text().split()) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert not set(asked.read_text().split()) & stored
        kills += os.WIFSIGNALED(status)
        if os.WIFEXITED(status):
            break
    assert kills >= 10
    assert path.read_bytes() == (tmp_path / "whole" / "evaluation.jsonl").read_bytes()
    record = json.loads((tmp_path / "killed" / "evaluation.json").read_text())
    assert record["benchmarks"] == whole["benchmarks"]


def _whole_chunks(path):
    """Ids of the rows whose chunk (two rows, two samples each) is on the disk."""
    data = path.read_bytes() if path.exists() else b""
    ids = [json.loads(line)["id"] for line in data[: data.rfind(b"\n") + 1].splitlines()]
    return set(ids[: len(ids) // 4 * 4])

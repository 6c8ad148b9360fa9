"""What a run measures while it trains: it changes nothing, its numbers are the models', the best model is kept."""

import signal

import pytest
import torch
from grpo.tiny_run import HELDOUT, in_child, make_trainer
from random_vlm import random_vlm, save_random_vlm

from r1v_rl.checkpoints import checkpoint_folders
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.accuracy import Answered
from r1v_rl.evaluate.reflections import opening_tokens, reflection_openings
from r1v_rl.grpo.config import GRPOConfig, RunConfig
from r1v_rl.grpo.main import check_measured
from r1v_rl.grpo.trainer import GRPOTrainer
from r1v_rl.scoring import Verdict
from r1v_rl.state_files import weight_hash
from r1v_rl.tracking.metrics import read_metrics
from r1v_rl.types import Completion

MEASURED = {"eval_strategy": "steps", "eval_steps": 1, "grounding_every": 2, "answer_kind": "text"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


def weights(model, folder, changes) -> str:
    assert in_child(model, folder, changes) == 0
    return (folder / "final.txt").read_text()


def test_a_run_that_measures_is_the_run_that_does_not_and_resumes_exactly(model, tmp_path):
    """With dropout, which draws from the random stream of training at every forward."""
    plain = {"max_steps": 4, "lora": True, "num_iterations": 2}
    wanted = weights(model, tmp_path / "plain", plain)
    changes = {**MEASURED, **plain}
    assert in_child(model, tmp_path / "killed", changes, {"step": 2, "moment": "after save"}) == -signal.SIGKILL
    assert weights(model, tmp_path / "killed", changes) == wanted
    lines = read_metrics(tmp_path / "killed")
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [1, 2, 3, 4]
    found = [line for line in lines if "grounding/gap" in line]
    assert [line["step"] for line in found] == [0, 2, 4]
    for control in ("blank", "shuffled", "dropped"):
        assert {f"grounding/{control}/{gap}{end}" for gap in ("accuracy_gap", "logprob_gap")
                for end in ("", "_low", "_high")} <= set(found[0])  # fmt: skip
    assert found[0]["grounding/gap"] == found[0]["grounding/blank/accuracy_gap"]
    assert found[0]["grounding/blank/logprob_gap"] != found[2]["grounding/blank/logprob_gap"], "old weights were asked"


def answer(example, right: bool, token_ids=(1,)) -> Answered:
    return Answered(example, Completion(list(token_ids), [], "", False), Verdict(right, None, ""))


def test_the_best_model_is_kept_and_loaded(model, tmp_path, monkeypatch):
    """Best at step 2 of 4, between two saves, beyond `save_total_limit`."""

    def heldout_answers(trainer, examples=None, *, blank=False):
        right = {1: 1, 2: 3, 3: 2, 4: 0}[trainer.state.global_step]
        return [answer(row, i < right) for i, row in enumerate(trainer.eval_examples)]

    monkeypatch.setattr(GRPOTrainer, "heldout_answers", heldout_answers)
    saved = {}
    trainer = make_trainer(
        model, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=1, load_best_model_at_end=True,
    )  # fmt: skip
    monkeypatch.setattr(
        trainer.callback_handler, "on_save",
        lambda args, state, control: saved.setdefault(state.global_step, weight_hash(trainer.model.state_dict()))
        and control,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2
    assert "checkpoint-2" in [path.name for path in checkpoint_folders(tmp_path)]
    assert weight_hash(trainer.model.state_dict()) == saved[2] != saved[4]
    assert trainer._engine_version is None, "the engine would answer with the last weights"


def test_several_sets(model, tmp_path, monkeypatch):
    trainer = make_trainer(model, tmp_path, max_steps=1, grounding_every=1)
    first, second = trainer.eval_examples[:1], trainer.eval_examples[1:]
    trainer.eval_sets = {"a": first, "b": second}
    monkeypatch.setattr(
        trainer, "heldout_answers", lambda rows: [answer(row, row.id == HELDOUT[1]["id"]) for row in rows]
    )
    found = trainer.evaluate()
    assert (found["eval_a_accuracy"], found["eval_b_accuracy"], found["eval_accuracy"]) == (0.0, 0.5, 0.25)
    assert found["eval_b_low"] < 0.5 < found["eval_b_high"] and found["eval_reflections"] == 0.0


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("Wait, 3 is wrong.\nHmm. But wait: so", ["Wait", "Hmm", "wait"]),
        ("I can wait. Alternatively, 4", ["Alternatively"]),
        ("<think>hmmm, so. Oh, wait", ["hmmm", "wait"]),
        ("They wait\nand waiting.\nWaiter", []),
    ],
)
def test_where_reflections_open(text, opened):
    assert [text[i:].split(",")[0].split(".")[0].split(":")[0] for i in reflection_openings(text)] == opened


def test_the_entropy_is_that_before_the_opening_token(model, tmp_path):
    """Against the model's own forward, one answer at a time."""
    trainer = make_trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, critical_tokens=["red", "blue"])
    tokenizer = random_vlm()[1].tokenizer
    texts = ["red 4.\nblue 5", "Look at red", "Look .\n red circles"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [answer(row, True, tokens) for row, tokens in zip(trainer.eval_examples, ids, strict=True)]
    places = [opening_tokens(tokens, tokenizer, ["red", "blue"]) for tokens in ids]
    assert [len(at) for at in places] == [2, 0, 1]
    assert [tokenizer.decode(ids[0][at:]).strip()[:3] for at in places[0]] == ["red", "blu"]
    entropies = []
    for prompt, tokens, at in zip(trainer._encode(trainer.eval_examples), ids, places, strict=True):
        with torch.no_grad():
            inputs = torch.tensor([prompt.prompt_ids + tokens])
            logits = trainer.model(input_ids=inputs, **prompt.vision_inputs).logits[0, len(prompt.prompt_ids) - 1 :]
        entropies += [torch.distributions.Categorical(logits=logits[i]).entropy().item() for i in at]
    found = trainer._reflections(rows)
    assert found["reflections"] == 1.0
    assert found["critical_token_entropy"] == pytest.approx(sum(entropies) / 3, abs=1e-4)


def test_what_cannot_be_measured_is_refused(tmp_path):
    args = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "per_device_train_batch_size": 8}
    with pytest.raises(RecipeError, match="`eval_on` is measured every `eval_steps`"):
        check_measured(RunConfig(eval_on=["scenes"]), GRPOConfig(**args), [])
    with pytest.raises(RecipeError, match="`grounding_every` needs at least two"):
        check_measured(RunConfig(), GRPOConfig(**args, grounding_every=5), [])
    with pytest.raises(RecipeError, match="`grounding_controls` of blank, shuffled, dropped"):
        GRPOConfig(**args, grounding_controls=["grey"])

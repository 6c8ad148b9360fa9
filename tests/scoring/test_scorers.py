"""Scorers give whole numbers from 0 to 5 or say why not; the three kinds, and how a scalar becomes a score."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from random_vlm import picture
from scoring.chat_server import chat_server
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    SiglipVisionConfig,
)

from r1v_rl.errors import RecipeError, RewardError, UserError
from r1v_rl.models.image_tokens import IMAGE_TOKENS
from r1v_rl.scoring.judge_config import WorkedAnswer
from r1v_rl.scoring.loader import load_rewards
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.reward_model import scores_of
from r1v_rl.scoring.scorer_config import Score, ScorerConfig
from r1v_rl.scoring.scorers import make_scorer
from r1v_rl.tiny.tokenizer import CHAT_TEMPLATE, build_tokenizer
from r1v_rl.types import Example


def worked(row_id: str, completion: str, answer: str = "3", **columns) -> WorkedAnswer:
    messages = [{"role": "user", "content": [{"type": "text", "text": f"How many circles, {row_id}?"}]}]
    example = Example(row_id, messages, (), answer, {"id": row_id, "answer": answer, **columns})
    return WorkedAnswer(example, completion, "<think>" + completion)


ANSWERS = [worked(str(i), f"a{i} red</think>\n\\boxed{{{i}}}") for i in range(6)]


@pytest.fixture
def store(tmp_path):
    with ReplyStore(tmp_path / "replies.jsonl") as store:
        yield store


def test_scorers_need_neither_torch_nor_sympy():
    code = (
        "import sys, r1v_rl.scoring.scorers, r1v_rl.scoring.chat_model; "
        "sys.exit(bool({'torch', 'sympy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- rubric ---------------------------------------------------------------------------------------------------------


def test_the_rubric_is_applied_by_the_judge_and_a_reply_without_a_score_is_no_zero(store):
    def answer(text, tries):
        return "I will not grade this." if ", 2?" in text else f"Fine.\nScore: {3 + (', 4?' in text)}"

    with chat_server(answer) as server:
        config = ScorerConfig(judge_model="judge", judge_base_url=server.base_url)
        scores = make_scorer(config)(ANSWERS, store)
        again = make_scorer(config)(ANSWERS, store)
    assert [score.value for score in scores] == [3, 3, None, 3, 4, 3]
    assert scores[2].problem == "no score in the reply 'I will not grade this.'"
    assert again == scores and set(server.asked.values()) == {1}
    (shown,) = [text for text in server.asked if ", 4?" in text]
    assert "Correct final answer: 3" in shown and "<think>a4 red</think>\n\\boxed{4}" in shown
    assert server.requests[0]["temperature"] == 0.0


def test_another_rubric_is_another_question(store):
    with chat_server(lambda text, tries: "Score: 2") as server:
        for rubric in ("Grade {question} {response}", "Judge {question} {response}"):
            config = ScorerConfig(judge_model="judge", judge_base_url=server.base_url, rubric=rubric)
            make_scorer(config)(ANSWERS[:1], store)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "`scorer: rubric` needs `judge_model`"),
        ({"scorer": "x.py:f", "answer_judge": "llm"}, "`answer_judge: llm` needs `judge_model`"),
        ({"scorer": "reward_model"}, "needs `reward_model`"),
        ({"scorer": "reward_model", "reward_model": "x"}, "set one of"),
        ({"scorer": "reward_model", "reward_model": "x", "reward_model_thresholds": [1.0, 2.0]}, "5 rising numbers"),
        (
            {"scorer": "reward_model", "reward_model": "x", "reward_model_thresholds": [1.0, 2.0, 2.0, 3.0, 4.0]},
            "5 rising numbers",
        ),
        (
            {"scorer": "reward_model", "reward_model": "x", "reward_model_quantiles": [0.1, 0.2, 0.3, 0.4, 1.5]},
            "between 0 and 1",
        ),
        ({"scorer": "x.py:f", "rubric": "grade it"}, "`rubric` must contain"),
    ],
)
def test_a_recipe_that_cannot_score_is_refused(keys, message):
    with pytest.raises(RecipeError, match=message):
        ScorerConfig(**keys)


# --- rules ----------------------------------------------------------------------------------------------------------


def rule(tmp_path, body: str) -> str:
    path = tmp_path / "rule.py"
    path.write_text(f"def rule(prompts, completions, answer, id, **columns):\n    {body}\n")
    return f"{path}:rule"


def test_a_rule_is_called_as_a_reward_is(store, tmp_path):
    body = "return [None if i == '1' else len(a) + x for i, a, x in zip(id, answer, columns['x'])]"
    answers = [worked("0", "c", x=2), worked("1", "c", x=2), worked("2", "c", answer="12", x=3)]
    scorer = make_scorer(ScorerConfig(scorer=rule(tmp_path, body)))
    assert scorer(answers, store) == [Score(3), Score(None, "the rule cannot judge it"), Score(5)]


@pytest.mark.parametrize("value", ["2.5", "6", "-1"])
def test_a_rule_that_gives_another_number_is_refused(store, tmp_path, value):
    scorer = make_scorer(ScorerConfig(scorer=rule(tmp_path, f"return [{value}] * len(id)")))
    with pytest.raises(RewardError, match=r"whole numbers from 0 to 5 or None; received .* for row 0"):
        scorer(ANSWERS, store)


# --- reward models --------------------------------------------------------------------------------------------------


def test_scalars_become_scores_by_thresholds_and_by_quantiles():
    thresholds = [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert scores_of([-5, -1, -0.5, 0.99, 1, 2.5, 3, 99], thresholds=thresholds) == [0, 1, 1, 2, 3, 4, 5, 5]
    # of 0..10 the quantiles .1 .3 .5 .7 .9 are 1, 3, 5, 7, 9
    scores = scores_of(list(range(11)), quantiles=[0.1, 0.3, 0.5, 0.7, 0.9])
    assert scores == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert scores_of([], quantiles=[0.1, 0.3, 0.5, 0.7, 0.9]) == []


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=None,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_config(folder, **keys) -> ScorerConfig:
    keys = {"reward_model_thresholds": [-2.0, -1.0, 0.0, 1.0, 2.0], **keys}
    return ScorerConfig(scorer="reward_model", reward_model=str(folder), **keys)


def test_a_reward_models_scalar_is_the_same_alone_and_in_a_padded_batch(text_model, tmp_path):
    answers = [worked(str(i), "a1 red " * (1 + 3 * i) + f"</think>\n\\boxed{{{i}}}") for i in range(5)]
    rewards = []
    for size in (1, 5):
        with ReplyStore(tmp_path / f"{size}.jsonl") as store:
            make_scorer(reward_config(text_model, reward_model_batch_size=size))(answers, store)
            rewards.append(list(store._values.values()))
    assert torch.tensor(rewards[0]) == pytest.approx(torch.tensor(rewards[1]), abs=1e-5)
    model = Qwen2ForSequenceClassification.from_pretrained(text_model)
    tokenizer = build_tokenizer()
    messages = [*answers[2].example.messages, {"role": "assistant", "content": answers[2].response}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
    assert rewards[0][2] == pytest.approx(model(ids).logits.item(), abs=1e-5)


def test_rewards_are_kept(text_model, store, monkeypatch):
    first = make_scorer(reward_config(text_model))(ANSWERS, store)
    monkeypatch.setattr("r1v_rl.scoring.reward_model.load_reward_model", None)
    assert make_scorer(reward_config(text_model))(ANSWERS, store) == first
    assert {score.value for score in first} <= {0, 1, 2, 3, 4, 5}


def test_a_reward_model_by_name_gives_its_scalar(text_model):
    keys = {"reward_model": str(text_model), "reward_model_batch_size": 2}
    (reward,) = load_rewards(["reward_model"], SimpleNamespace(**keys), prompt_opens_think=True)
    texts = ["a1 red</think>\\boxed{3}", "a1 red blue blue</think>\\boxed{4}", "a1</think>\\boxed{3}"]
    question = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = reward(prompts=[question, "How many?", question], completions=completions, images=[()] * 3)
    model, tokenizer = Qwen2ForSequenceClassification.from_pretrained(text_model), build_tokenizer()
    for text, scalar in zip(texts, rewards, strict=True):
        messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "<think>" + text}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
        assert scalar == pytest.approx(model(ids).logits.item(), abs=1e-5)
    with pytest.raises(UserError, match="needs `reward_model`"):
        load_rewards(["reward_model"], SimpleNamespace())
    with pytest.raises(UserError, match="cannot be read"):
        load_rewards(["reward_model"], SimpleNamespace(reward_model="/nowhere"))


def test_a_scalar_is_the_same_whatever_else_is_judged_in_the_call(text_model):
    """To the last bit, so that it does not matter which groups are judged early."""
    keys = {"reward_model": str(text_model), "reward_model_batch_size": 4}
    (reward,) = load_rewards(["reward_model"], SimpleNamespace(**keys))
    texts = ["a1 " + "red blue " * length for length in (1, 30, 2, 9, 17, 4, 3, 25, 8)]
    given = {
        "prompts": [f"How many{'?' * (i // 3)}" for i in range(9)],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "images": [()] * 9,
        "id": [f"row{i // 3}" for i in range(9)],
    }
    parts = [reward(**{key: values[i : i + 3] for key, values in given.items()}) for i in (0, 3, 6)]
    assert reward(**given) == [scalar for part in parts for scalar in part] and reward.per_completion


def test_a_model_with_several_outputs_is_no_reward_model(tmp_path, store):
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_labels=3,
    )  # fmt: skip
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"one output, a scalar; .* has 3"):
        make_scorer(reward_config(tmp_path))(ANSWERS, store)


def save_picture_model(folder):
    """A Gemma 3 classifier with random weights, four visual tokens a picture."""
    tokenizer = build_tokenizer(CHAT_TEMPLATE.replace(IMAGE_TOKENS["context_image_token"], "<boi>") + "{% endif -%}")
    marks = {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks.values()])
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=marks)
    size = {"height": 32, "width": 32}
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=size), tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4
    )
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_reward_model_that_sees_pictures_is_shown_them(tmp_path):
    """Gemma 3's classifier reads pictures; another picture is another reward, and rows without one are scored too."""
    folder = save_picture_model(tmp_path / "model")
    image, text = {"type": "image"}, {"type": "text", "text": "How many?"}
    answers = []
    for row_id, pictures in (("red", [picture(1)]), ("blue", [picture(2)]), ("none", []), ("red too", [picture(1)])):
        messages = [{"role": "user", "content": [*[image for _ in pictures], text]}]
        answers.append(WorkedAnswer(Example(row_id, messages, tuple(pictures), "3", {}), "3", "<think>3"))
    with ReplyStore(tmp_path / "replies.jsonl") as store:
        scores = make_scorer(reward_config(folder))(answers, store)
        rewards = list(store._values.values())
    assert [score.value is not None for score in scores] == [True] * 4
    assert len(rewards) == 3, "the same picture and text is scored once"
    assert len({round(reward, 5) for reward in rewards}) == 3

    (by_name,) = load_rewards(["reward_model"], SimpleNamespace(reward_model=str(folder), reward_model_batch_size=2))
    again = by_name(
        prompts=[answer.example.messages for answer in answers],
        completions=[[{"role": "assistant", "content": answer.response}] for answer in answers],
        images=[answer.example.images for answer in answers],
    )
    assert again[3] == pytest.approx(again[0], abs=1e-5)
    assert sorted(again[:3]) == pytest.approx(sorted(rewards), abs=1e-5)

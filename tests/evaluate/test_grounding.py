"""Grounding: a model that learned from pictures shows a gap, one that learned from blank ones does not."""

import json

import pytest
import torch
from PIL import Image
from random_vlm import picture, random_vlm, save_random_vlm

from r1v_rl import cli
from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.errors import DataError
from r1v_rl.evaluate.accuracy import answer_greedily, blanked
from r1v_rl.evaluate.grounding import CONTROLS, control_rows, gold_logprobs, grounding_lines, grounding_measures
from r1v_rl.models.compose import compose_vlm
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import encode_prompt
from r1v_rl.sft.config import SFTConfig
from r1v_rl.sft.trainer import SFTTrainer
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.training.launch import load_model

COLORS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 170, 60), "yellow": (230, 210, 30)}


def coloured(seed: int, color: str) -> Image.Image:
    """A picture full of one colour, and a little noise: every one is another one."""
    return Image.blend(Image.new("RGB", (96, 96), COLORS[color]), picture(seed, 96, 96), 0.2)


def rows(start: int, count: int) -> list[dict]:
    """Every colour as often as the others: whoever always says the same is right in a quarter, whatever it says."""
    names = [list(COLORS)[i % len(COLORS)] for i in range(start, start + count)]
    return [
        {
            "id": f"row{start + i}",
            "prompt": "<image>\nWhat color ?",
            "images": [coloured(start + i, name)],
            "answer": name,
            "completion": f"\n</think>\n\n\\boxed{{{name}}}",
        }
        for i, name in enumerate(names)
    ]


def gaps(folder, blind: bool) -> dict:
    """The shipped tiny parts, trained for a few seconds with pictures or with grey ones, measured with pictures."""
    compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), folder / "start")
    model, processor = load_model(str(folder / "start")), load_processor(str(folder / "start"))
    train = examples_from_rows(rows(0, 96))
    args = SFTConfig(
        output_dir=str(folder), trainable=["projector", "language_model"], max_steps=30, learning_rate=2e-3,
        per_device_train_batch_size=4, packing=True, max_length=256, bf16=False, use_cpu=True, report_to=[],
        save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [blanked(example) for example in train] if blind else train
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    tokenizer = processor.tokenizer
    engine = TransformersEngine(trainer.model, tokenizer, eos_token_ids=[tokenizer.eos_token_id], banned_token_ids=[])
    right, logprobs = {}, {}
    for name, examples in control_rows(examples_from_rows(rows(1000, 40))).items():
        prompts = [encode_prompt(processor, example, device="cpu") for example in examples]
        answered = answer_greedily(engine, prompts, max_tokens=12, answer_kind="text", timeout_s=5)
        right[name] = {row.example.id: [row.verdict.correct is True] for row in answered}
        logprobs[name] = gold_logprobs(engine, prompts, processor)
    return grounding_measures(right, logprobs)["controls"]


def test_a_model_that_saw_pictures_has_a_gap_and_a_blind_one_has_none(tmp_path):
    seeing, blind = gaps(tmp_path / "seeing", blind=False), gaps(tmp_path / "blind", blind=True)
    assert set(seeing) == set(blind) == set(CONTROLS)
    for control in CONTROLS:
        assert seeing[control]["accuracy_gap"]["low"] > 0, (control, seeing)
        assert seeing[control]["logprob_gap"]["low"] > 0, (control, seeing)
        assert blind[control]["accuracy_gap"]["low"] <= 0 <= blind[control]["accuracy_gap"]["high"], (control, blind)
        assert abs(blind[control]["logprob_gap"]["value"]) < 0.1 * seeing[control]["logprob_gap"]["value"]


def test_the_controls():
    made = [
        {
            "id": str(i),
            "prompt": "<image>" * n + "Which?",
            "images": [picture(i * 10 + k) for k in range(n)],
            "answer": "a",
        }
        for i, n in enumerate([1, 1, 1, 2, 2, 3, 0])
    ]
    made[2]["images"] = made[1]["images"]
    examples = examples_from_rows(made)
    found = control_rows(examples, seed=3)
    assert [e.id for e in found["pictures"]] == list("012345")
    assert [e.id for e in found["shuffled"]] == list("01234"), "no other row has three pictures"
    for row in found["shuffled"]:
        own, own_index = examples[int(row.id)], int(row.id)
        assert len(row.images) == len(own.images) and row.messages == own.messages
        assert [i.tobytes() for i in row.images] != [i.tobytes() for i in examples[own_index].images]
    for row in found["blank"]:
        assert all(low == high for image in row.images for low, high in image.getextrema())
    for row in found["dropped"]:
        assert not row.images and all(b["type"] == "text" for m in row.messages for b in m["content"])
    with pytest.raises(DataError, match="at least two rows with pictures, the held-out set has 1"):
        control_rows(examples[5:])


def test_gaps_worked_by_hand():
    right = {
        "pictures": {"a": [True], "b": [True, False], "c": [False]},
        "blank": {"a": [False], "b": [True], "c": [False]},
    }
    logprobs = {"pictures": {"a": -1.0, "b": -2.0, "c": -3.0}, "blank": {"a": -2.0, "b": -2.5}}
    found = grounding_measures(right, logprobs)
    gap = found["controls"]["blank"]
    assert found["num_rows"] == 3 and gap["num_rows"] == 2
    assert gap["accuracy_gap"]["value"] == pytest.approx((1.0 - 0.5) / 2) and gap["logprob_gap"]["value"] == 0.75
    assert gap["accuracy_gap"]["low"] == -0.5 and gap["accuracy_gap"]["high"] == 1.0
    assert grounding_lines(found) == ["gap, blank      +25.0 points [-50.0, +100.0], +0.75 nats [+0.50, +1.00]"]


def test_the_gold_answers_logprob_is_the_models():
    """The sum over the tokens behind `\\boxed{`, by the model's own forward."""
    model, processor = random_vlm()
    made = [{"id": "0", "prompt": "<image>How many?", "images": [picture(0)], "answer": "12"}]
    prompt = encode_prompt(processor, examples_from_rows(made)[0], device="cpu")
    tokenizer = processor.tokenizer
    engine = TransformersEngine(model, tokenizer, eos_token_ids=[0], banned_token_ids=[])
    head = tokenizer("\n</think>\n\n\\boxed{", add_special_tokens=False)["input_ids"]
    tail = tokenizer("12}", add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([prompt.prompt_ids + head + tail])
    with torch.no_grad():
        logprobs = model.eval()(input_ids=inputs, **prompt.vision_inputs).logits.log_softmax(-1)[0]
    wanted = sum(logprobs[-len(tail) - 1 + i, token].item() for i, token in enumerate(tail))
    assert gold_logprobs(engine, [prompt], processor)["0"] == pytest.approx(wanted, abs=1e-4)


def test_the_mode_of_evaluate(tmp_path, capsys):
    model = str(save_random_vlm(tmp_path / "model"))
    keys = {
        "model_name_or_path": model, "eval_dataset_name": "scenes", "eval_dataset_size": "5", "use_vllm": "false",
        "eval_dataset_kwargs": "{num_images: 1}", "max_completion_length": "4", "answer_kind": "text",
        "grounding": "true",
    }  # fmt: skip
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert cli.main(["evaluate", *words]) == 0
    found = json.loads((tmp_path / "model" / "evaluation.json").read_text())["grounding"]
    assert set(found["controls"]) == set(CONTROLS) and found["controls"]["blank"]["num_rows"] == found["num_rows"]
    assert capsys.readouterr().out.count("gap, ") == 3
    assert cli.main(["evaluate", *words]) == 0, "a second run takes the stored answers"
    assert json.loads((tmp_path / "model" / "evaluation.json").read_text())["grounding"] == found

"""Re-assembly: the projector stays what it was, the language model is the new one, and what cannot work is refused."""

import json

import pytest
import torch
from published_chat import INTERNVIT_6B, save_chat
from random_parts import TEXT_TEMPLATE, random_dinov2, random_llm, save_llm, text_tokenizer
from random_vlm import picture
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GotOcr2ImageProcessor

from r1v_rl.data.chat import load_processor
from r1v_rl.errors import UserError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.convert import convert_checkpoint
from r1v_rl.models.parts import part_hashes
from r1v_rl.models.transfer import transfer_projector
from r1v_rl.tiny.parts import resolve_part

THINKING = TEXT_TEMPLATE.replace("<|assistant|>", "<|assistant|><think>")


@pytest.fixture(scope="module")
def substitute(tmp_path_factory):
    """A composed model: tied Qwen2, tiles of 56 px, at most six and a thumbnail."""
    folder = tmp_path_factory.mktemp("substitute")
    compose_vlm(random_dinov2(), save_llm(folder / "llm", "qwen2"), folder / "vlm", image_size=56, max_image_tiles=6)
    return folder / "vlm"


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory):
    """An untied fine-tune of the substitute (its weights a little off), with another vocabulary and template."""
    folder = tmp_path_factory.mktemp("reasoning")
    tokenizer = text_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = THINKING
    base, llm = random_llm("qwen2", tied=True), random_llm("qwen2", tied=False, spare_rows=2)
    with torch.no_grad():
        for name, weight in base.model.state_dict().items():
            mine = llm.model.state_dict()[name][: len(weight)]
            mine.copy_(weight + torch.randn_like(weight) * 0.02)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(substitute, tmp_path):
    """The substitute with keys of one of its JSON files changed."""

    def change(file, **values):
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in substitute.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        content = json.loads((folder / file).read_text())
        for key, value in values.items():
            target = content
            *outer, last = key.split("__")
            for name in outer:
                target = target[name]
            target[last] = value
        (folder / file).write_text(json.dumps(content))
        return folder

    return change


def test_projector_and_encoder_of_the_one_language_model_of_the_other(substitute, reasoning, tmp_path):
    transfer = transfer_projector(substitute, reasoning, tmp_path)
    before = AutoModelForImageTextToText.from_pretrained(substitute)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path)
    old, new = part_hashes(before), part_hashes(after)
    assert old["projector"] == new["projector"] == transfer.kept["projector"]
    assert old["vision_encoder"] == new["vision_encoder"] == transfer.kept["vision_encoder"]
    llm, processor = AutoModelForCausalLM.from_pretrained(reasoning), AutoProcessor.from_pretrained(tmp_path)
    ids = processor.tokenizer("Two <think>plus</think> two?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = llm(ids).logits
        assert torch.equal(after(ids).logits[..., : expected.shape[-1]], expected)
    assert not after.config.tie_word_embeddings and before.config.tie_word_embeddings


def test_tiles_stay_and_tokenizer_and_template_are_the_reasoning_models(substitute, reasoning, tmp_path):
    transfer_projector(substitute, reasoning, tmp_path)
    before, after = AutoProcessor.from_pretrained(substitute), AutoProcessor.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    prompt = after.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|><IMG_CONTEXT>\nWhich?<|end|><|assistant|><think>"
    inputs = [p(text=[prompt], images=[picture(0, 300, 100)], return_tensors="pt") for p in (before, after)]
    assert torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"]) and len(inputs[0]["pixel_values"]) == 4
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert int((inputs[1]["input_ids"] == model.config.image_token_id).sum()) == 16
    assert before.image_token_id != after.image_token_id
    assert model(**inputs[1]).logits.isfinite().all()


def test_the_report_says_what_changed_and_what_did_not(substitute, reasoning, tmp_path):
    transfer = transfer_projector(substitute, reasoning, tmp_path)
    changed = transfer.changed
    assert changed["generation_prompt"] == ("<|assistant|>", "<|assistant|><think>")
    assert changed["vocabulary"] == (264, 266) and changed["rows_added"] == (0, 4)
    assert changed["tokens_moved"] == (0, 6) and changed["image_token_ids"] == ([262, 260, 261], [264, 262, 263])
    assert not {"family", "eos_token", "context_length"} & changed.keys()
    assert transfer.kept["tiles"] == "at most 6 of 56 px, 4 tokens each"
    assert transfer.embedding_cosine > 0.95 and not transfer.warnings
    assert "generation_prompt    '<|assistant|>' -> '<|assistant|><think>'" in transfer.report()


def test_a_model_of_another_base_is_warned_of(substitute, tmp_path):
    save_llm(tmp_path / "llm", "llama", seed=5, num_hidden_layers=3)
    transfer = transfer_projector(substitute, tmp_path / "llm", tmp_path / "vlm")
    assert transfer.changed["family"] == ("qwen2, 2 layers", "llama, 3 layers")
    assert abs(transfer.embedding_cosine) < 0.2
    assert "built differently" in transfer.warnings[0] and "little in common" in transfer.warnings[1]
    assert "warning: " in transfer.report()


def test_another_hidden_size_is_refused_with_both_numbers(substitute, tmp_path):
    with pytest.raises(UserError, match=r"writes vectors of 64 numbers, .*reasoning_llm reads \d+"):
        transfer_projector(substitute, resolve_part("tiny/reasoning_llm"), tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("processor_config.json", {"image_processor__size": {"height": 70, "width": 70}}, "70 x 70 px and its vision"),
        ("processor_config.json", {"image_seq_length": 9}, "becomes 4 visual tokens, .* its processor 9"),
        ("config.json", {"image_seq_length": 9}, "`image_seq_length` 9"),
        ("processor_config.json", {"image_processor__max_patches": 300}, "up to 1206 tokens .* is 1024"),
        ("config.json", {"vision_feature_layer": -2}, "`vision_feature_layer`: -1.* received -2"),
    ],
)
def test_tiles_that_the_model_cannot_read_are_refused(copy_of, reasoning, tmp_path, file, change, message):
    with pytest.raises(UserError, match=message):
        transfer_projector(copy_of(file, **change), reasoning, tmp_path / "vlm")
    assert not (tmp_path / "vlm").exists()


def test_what_holds_no_projector_is_refused(substitute, reasoning, tmp_path):
    with pytest.raises(UserError, match=r"must be a composed model .* is a `qwen2`"):
        transfer_projector(reasoning, reasoning, tmp_path / "vlm")
    with pytest.raises(UserError, match="cannot be read"):
        transfer_projector(tmp_path / "nothing", reasoning, tmp_path / "vlm")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((substitute / name).read_bytes())
    with pytest.raises(UserError, match="must hold its processor too"):
        transfer_projector(tmp_path, reasoning, tmp_path / "vlm")


def test_tiles_of_a_converted_model_stay_transposed(tmp_path, reasoning):
    convert_checkpoint(save_chat(tmp_path / "chat", "v1", INTERNVIT_6B), tmp_path / "hf")
    transfer_projector(tmp_path / "hf", reasoning, tmp_path / "vlm")
    before, after = load_processor(str(tmp_path / "hf")), load_processor(str(tmp_path / "vlm"))
    pixels = [p.image_processor([picture(0, 300, 100)], return_tensors="pt")["pixel_values"] for p in (before, after)]
    upright = GotOcr2ImageProcessor(**before.image_processor.to_dict())([picture(0, 300, 100)], return_tensors="pt")
    assert torch.equal(*pixels) and torch.equal(pixels[0], upright["pixel_values"].mT)


def _tokenizer(template=TEXT_TEMPLATE, **attributes):
    tokenizer = text_tokenizer()
    tokenizer.chat_template = template
    if attributes:
        tokenizer._set_model_specific_special_tokens(attributes)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: _tokenizer(None), r"put a chat_template\.jinja"),
        (lambda: _tokenizer("{{ messages[0]['content'] }}"), "must open the assistant's turn"),
        (lambda: _tokenizer("{{ messages | length }}"), "must write the text of a user's message"),
        (lambda: _tokenizer(context_image_token="<|pad|>"), "`start_image_token` of the tokenizer must be one token"),
    ],
)
def test_a_tokenizer_that_cannot_carry_images_is_refused(substitute, tmp_path, tokenizer, message):
    save_llm(tmp_path / "llm", tokenizer=tokenizer())
    with pytest.raises(UserError, match=message):
        transfer_projector(substitute, tmp_path / "llm", tmp_path / "vlm")

"""A composed model is its parts: same weights, same text logits, and a folder that transformers loads."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, InternVLVisionModel

from r1v_rl.data.scenes import scenes_rows
from r1v_rl.errors import UserError
from r1v_rl.models.compose import compose_vlm, shuffled_features
from r1v_rl.models.parts import part_of
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tiny.tokenizer import build_tokenizer

ENCODER, LLM = resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("composed")
    compose_vlm(ENCODER, LLM, path)
    return path


@pytest.fixture(scope="module")
def vlm(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_text_logits_are_the_bare_language_models(folder, vlm):
    llm = AutoModelForCausalLM.from_pretrained(LLM).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.tokenizer(scenes_rows("heldout", 1, 0, num_images=0)[0]["problem"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(vlm(**inputs).logits, llm(**inputs).logits)


def test_vision_features_are_the_bare_encoders_in_raster_order(vlm):
    encoder = InternVLVisionModel.from_pretrained(ENCODER).eval()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = vlm.model.multi_modal_projector(shuffled_features(encoder, pixels))
        assert torch.equal(
            vlm.model.get_image_features(
                pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
            ).pooler_output,
            expected,
        )


def test_a_picture_takes_nine_tokens_and_is_seen(folder, vlm):
    processor = AutoProcessor.from_pretrained(folder)
    rows = scenes_rows("heldout", 2, 0, num_images=1)
    content = [{"type": "image"}, {"type": "text", "text": "How many circles are there?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    logits = []
    for row in rows:
        inputs = processor(text=[text], images=row["images"], return_tensors="pt")
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 9
        with torch.no_grad():
            logits.append(vlm(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_head_and_embedding_are_untied_everywhere(vlm):
    assert vlm.config.tie_word_embeddings is False and vlm.config.text_config.tie_word_embeddings is False
    assert vlm.lm_head.weight.data_ptr() != vlm.get_input_embeddings().weight.data_ptr()


def test_projector_depends_on_the_seed_and_nothing_else_does(folder, tmp_path):
    first = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    state = torch.random.get_rng_state()
    second = compose_vlm(ENCODER, LLM, tmp_path, seed=1).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    changed = {part_of(name) for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"projector"}


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        compose_vlm(ENCODER, LLM, tmp_path, tokenizer=tokenizer)

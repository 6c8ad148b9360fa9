"""Encoders keep their features inside InternVL's vision model, or are refused with the reason."""

import json

import pytest
import torch
from random_parts import random_dinov2
from transformers import AutoProcessor, InternVLVisionModel, SiglipVisionConfig, SiglipVisionModel

from r1v_rl.errors import UserError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.encoders import load_vision_encoder, pixel_statistics
from r1v_rl.tiny.parts import resolve_part

ENCODER, LLM = resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm")


@pytest.mark.parametrize("image_size", [56, 70, 84])
def test_dinov2_gives_its_own_features_at_every_size(tmp_path, image_size):
    dinov2 = random_dinov2(image_size=70)
    dinov2.save_pretrained(tmp_path)
    encoder = load_vision_encoder(tmp_path, image_size)
    assert encoder.config.image_size == (image_size, image_size)
    pixels = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).last_hidden_state, dinov2(pixels).last_hidden_state)


def test_dinov2_is_made_for_224_px_where_nothing_else_is_said():
    assert load_vision_encoder(random_dinov2()).config.image_size == (224, 224)


def test_another_size_of_an_internvit_is_its_own_interpolation():
    encoder, resized = InternVLVisionModel.from_pretrained(ENCODER).eval(), load_vision_encoder(ENCODER, 128)
    pixels = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(resized(pixels).last_hidden_state, encoder(pixels).last_hidden_state)


def test_the_tower_of_a_composed_model_is_an_encoder(tmp_path):
    compose_vlm(random_dinov2(), LLM, tmp_path, image_size=56)
    tower, original = load_vision_encoder(tmp_path), load_vision_encoder(random_dinov2(), 56)
    assert tower.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(tower.state_dict()[name], weight) for name, weight in original.state_dict().items())


def test_pixels_are_normalised_as_the_encoder_was_trained_with(tmp_path):
    assert pixel_statistics(str(ENCODER))["image_mean"][0] == pytest.approx(0.4815, abs=1e-4)  # CLIP's, from its file
    compose_vlm(ENCODER, LLM, tmp_path / "tiny")
    assert pixel_statistics(str(tmp_path / "tiny")) == pixel_statistics(str(ENCODER))
    compose_vlm(random_dinov2(), LLM, tmp_path / "dinov2")
    processor = AutoProcessor.from_pretrained(tmp_path / "dinov2")
    for part in (processor.image_processor, processor.video_processor):
        assert list(part.image_mean) == [0.485, 0.456, 0.406] and list(part.image_std) == [0.229, 0.224, 0.225]
    assert pixel_statistics(str(tmp_path))["image_mean"] == [0.485, 0.456, 0.406]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    assert pixel_statistics(str(tmp_path)) == {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}


def test_siglip_is_refused_with_the_reason(tmp_path):
    config = SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    SiglipVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"siglip_vision_model`: it has no class token"):
        load_vision_encoder(tmp_path)


def test_what_else_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_vision_encoder(tmp_path / "nothing")
    with pytest.raises(UserError, match="`qwen2`: its layers are other ones"):
        load_vision_encoder(LLM)
    with pytest.raises(UserError, match="gated"):
        load_vision_encoder(random_dinov2(use_swiglu_ffn=True))
    with pytest.raises(UserError, match="multiple of the encoder's patch of 14 px, received 60"):
        load_vision_encoder(random_dinov2(), 60)

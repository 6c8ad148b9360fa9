"""vLLM loads a composed folder without our code and writes what transformers writes."""

import pytest
import torch
from random_parts import random_dinov2, save_llm
from random_vlm import picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from r1v_rl.models.compose import compose_vlm
from r1v_rl.tiny.parts import resolve_part

NUM_TOKENS = 12


def tiny(folder):
    """The shipped parts: untied Qwen2, its tokenizer and template know of images."""
    compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), folder)


def dinov2_and_tied(family):
    """DINOv2 with its final norm, up to six tiles and a thumbnail; rows for the image tokens join a tied table."""

    def build(folder):
        llm = save_llm(folder.with_name("llm"), family, tied=True)
        compose_vlm(random_dinov2(), llm, folder, image_size=56, max_image_tiles=6)

    return build


@pytest.mark.parametrize(
    "build", [tiny, dinov2_and_tied("llama"), dinov2_and_tied("qwen3")], ids=["tiny", "llama", "qwen3"]
)
def test_vllm_and_transformers_write_the_same(tmp_path, monkeypatch, build):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    from vllm import LLM, SamplingParams

    folder = tmp_path / "vlm"
    build(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    images = [[picture(0)], [picture(1, 300, 100)], [picture(2, 64, 130), picture(3)], []]
    prompts, expected = [], []
    for pictures in images:
        content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": "How many circles are there?"}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append({"prompt": text, **({"multi_modal_data": {"image": pictures}} if pictures else {})})
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    engine = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=2**28 if not torch.cuda.is_available() else None,
        limit_mm_per_prompt={"image": 2, "video": 0},
    )
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected

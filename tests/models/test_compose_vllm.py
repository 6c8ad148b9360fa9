"""vLLM loads a composed folder without our code and writes what transformers writes."""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from r1v_rl.data.scenes import scenes_rows
from r1v_rl.models.compose import compose_vlm
from r1v_rl.tiny.parts import resolve_part

NUM_TOKENS = 12


def test_vllm_and_transformers_write_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    from vllm import LLM, SamplingParams

    compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    rows = [*scenes_rows("heldout", 3, 0, num_images=1), *scenes_rows("heldout", 2, 0, num_images=2)]
    prompts, expected = [], []
    for row in rows:
        content = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": row["problem"].split("\n")[-1]}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append({"prompt": text, "multi_modal_data": {"image": row["images"]}})
        inputs = processor(text=[text], images=row["images"], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        expected.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    engine = LLM(
        str(tmp_path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=2**28 if not torch.cuda.is_available() else None,
        limit_mm_per_prompt={"image": 2, "video": 0},
    )
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected

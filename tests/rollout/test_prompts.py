"""A prompt encoded without its pixels is the one that the processor makes of it, token for token."""

import pytest
from random_families import random_family
from random_vlm import TILE, picture, random_vlm

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.rollout.prompts import encode_prompt, prompt_encoder

FAMILIES = {
    "internvl": lambda: random_vlm(max_tiles=6),
    **{name: lambda name=name: random_family(name) for name in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_pixels_the_tokens_are_the_same(family):
    processor = FAMILIES[family]()[1]
    shapes = [(1, 1), (2, 1), (1, 3), (2, 2), (1, 1)]
    pictures = [picture(i, width * TILE, height * TILE + 4) for i, (width, height) in enumerate(shapes)]
    problems = [("count", []), ("<image>\nsum", pictures[:1]), ("<image> and\n<image><image>?", pictures[2:])]
    rows = [{"problem": text, "answer": "1", "images": images} for text, images in problems]
    encode = prompt_encoder(processor, device="cpu", with_vision_inputs=False)
    for example in examples_from_rows(rows):
        fast, slow = encode(example), encode_prompt(processor, example, device="cpu")
        assert (fast.prompt_ids, fast.text_ids, fast.text) == (slow.prompt_ids, slow.text_ids, slow.text)
        assert len(fast.images) == len(slow.images) and not fast.vision_inputs

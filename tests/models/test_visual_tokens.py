import pytest
import torch

from r1v_rl.models.visual_tokens import VisualTokens
from tests.random_vlm import picture, random_vlm


@pytest.mark.parametrize("crop_to_patches", [True, False], ids=["composed here", "published InternVL3"])
def test_the_parts_make_what_the_whole_processor_makes(crop_to_patches):
    """InternVL's processor cuts pictures whatever its image processor says, and published ones say no."""
    _, processor = random_vlm(max_tiles=4)
    processor.image_processor.crop_to_patches = crop_to_patches
    pictures = [picture(0, width=64, height=32), picture(1, width=32, height=32)]
    text = processor.image_token * 2
    whole = processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False)

    visual = VisualTokens(processor)
    pixels = visual.pixels(pictures)["pixel_values"]
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(pixels) == sum(visual.num_tiles(p.size) for p in pictures) == 4  # two tiles and a thumbnail, one tile
    assert torch.equal(pixels, whole["pixel_values"])
    assert visual.expand(ids, [visual.ids(p.size) for p in pictures]) == whole["input_ids"][0].tolist()

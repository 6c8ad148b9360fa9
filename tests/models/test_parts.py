"""Which part a parameter belongs to, and how a stage proves that it left a part alone."""

import pytest
import torch
from random_vlm import random_vlm

from r1v_rl.models.parts import PARTS, part_hashes, part_of


@pytest.mark.parametrize("part", PARTS)
def test_one_changed_weight_changes_the_hash_of_its_part_alone(part):
    model, _ = random_vlm()
    before = part_hashes(model)
    weight = next(parameter for name, parameter in model.named_parameters() if part_of(name) == part)
    with torch.no_grad():
        weight.view(-1)[-1] += 1e-3
    after = part_hashes(model)
    assert {name for name in PARTS if before[name] != after[name]} == {part}

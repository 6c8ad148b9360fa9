"""A batch without pictures gives the same with a blank one, and gradients of zero for what sees pictures."""

import pytest
import torch
from random_families import FAMILIES, random_family
from random_vlm import random_vlm

from r1v_rl.models.blank_picture import BlankPicture
from r1v_rl.models.logprobs import Scored, add_logprob_head
from r1v_rl.models.parts import freeze_all_but, part_of
from r1v_rl.models.vision_features import VisionFeatures


def gradients(model, kwargs, scored) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logprobs = model(scored=scored, **kwargs).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("encoder_trains", [False, True])
@pytest.mark.parametrize("family", ["internvl", *FAMILIES])
def test_a_blank_picture_changes_nothing_but_missing_gradients(family, encoder_trains):
    model, processor = random_vlm() if family == "internvl" else random_family(family)
    freeze_all_but(model, ["projector", "language_model", *(["vision_encoder"] if encoder_trains else [])])
    add_logprob_head(model, temperature=1.0, float32_head=False)
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    kwargs = {"input_ids": ids, "attention_mask": mask}
    plain = Scored(torch.tensor([3, 4, 12]), torch.tensor([5, 6, 7]), None)
    wanted, without = gradients(model, kwargs, plain)
    scored = Scored(plain.positions, plain.targets, None)
    features = VisionFeatures(model) if VisionFeatures.why_not(model) is None else None
    assert BlankPicture.is_needed(model, shards=False)
    BlankPicture(processor, torch.device("cpu"), features).add_to(kwargs, scored)
    found, grads = gradients(model, kwargs, scored)
    torch.testing.assert_close(found, wanted)
    for name, parameter in model.named_parameters():
        if part_of(name) == "language_model":
            torch.testing.assert_close(grads[name], without[name], msg=name)
        elif part_of(name) == "projector" or (parameter.requires_grad and name in grads):
            assert name not in without and not grads[name].any(), name

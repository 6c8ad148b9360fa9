"""An adapter beside the LM head is refused; a head that trains whole beside an adapter is trained as it rolls out."""

import pytest
import torch
from grpo import tiny_run
from peft import LoraConfig
from random_vlm import save_random_vlm
from sft import tiny_sft

from r1v_rl.errors import RecipeError
from r1v_rl.grpo.batch import GenerationBatch, score


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("tiny", [tiny_run, tiny_sft])
@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], r".*(v_proj|lm_head)"])
def test_an_adapter_of_the_head_is_refused(model, tmp_path, tiny, modules):
    with pytest.raises(RecipeError, match=r"`lora_target_modules` must not.*`lora_modules_to_save: \[lm_head\]`"):
        tiny.make_trainer(model, tmp_path, peft_config=LoraConfig(target_modules=modules), trainable=None)


@pytest.mark.parametrize("tiny", [tiny_run, tiny_sft])
def test_all_linear_leaves_the_head_out(model, tmp_path, tiny):
    trainer = tiny.make_trainer(model, tmp_path, peft_config=LoraConfig(target_modules="all-linear"), trainable=None)
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and not any("lm_head" in name for name in names)


def test_a_head_that_trains_whole_is_the_one_that_rolls_out(model, tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = tiny_run.make_trainer(model, tmp_path, peft_config=lora, trainable=None)
    head = trainer.model.get_output_embeddings().modules_to_save["default"].weight
    torch.nn.init.normal_(head)
    prompts, written = trainer._encode(trainer.train_examples[1:2]), [5, 6, 7]  # text alone
    batch = GenerationBatch(
        prompts=prompts, completion_ids=[written, [8]], counts=[True, True], advantages=torch.zeros(2),
        process_tokens=1.0, weight_version=0,
    )  # fmt: skip
    logprobs = score(trainer.model, trainer._model_inputs(batch, [0, 1]))[0]
    logprobs.sum().backward()
    assert head.grad is not None and head.grad.abs().sum() > 0
    ids = torch.tensor([prompts[0].prompt_ids + written])
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    own = torch.log_softmax(logits[-4:-1].float(), -1).gather(1, ids[0, -3:, None])[:, 0]
    torch.testing.assert_close(logprobs[0, :3].detach(), own, atol=1e-4, rtol=1e-4)

"""A penalty and a limit for each prompt: both engines do the same, and as with one prompt at a time."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_vlm import picture, random_vlm, save_random_vlm
from transformers import GenerationConfig

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.prompts import encode_prompt, placeholder_ids
from r1v_rl.rollout.vllm_inprocess import VllmEngine

QUESTIONS = ["How many red circles?", "Which color is most frequent, and how many of the shapes have it?", "Count."] * 2
PENALTIES = [1.0, 2.0, 1.3, 1.1, 1.7, 1.0]
LIMITS = [24, 24, 9, 24, 1, 17]
EXTRAS = [{}, {"no_repeat_ngram_size": 3}]
GREEDY = Sampling(num_generations=1, max_tokens=LIMITS, temperature=0.0, repetition_penalty=PENALTIES)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, model, processor, prompts): prompts of several lengths, half of them with a picture."""
    folder = save_random_vlm(tmp_path_factory.mktemp("model"))
    model, processor = random_vlm()
    rows = [
        {
            "id": str(i),
            "problem": ("<image>" if i % 2 else "") + text,
            "answer": "1",
            "images": [picture(i)] if i % 2 else [],
        }
        for i, text in enumerate(QUESTIONS)
    ]
    prompts = [encode_prompt(processor, example, device="cpu") for example in examples_from_rows(rows)]
    return folder, model.eval(), processor, prompts


@pytest.fixture(scope="module")
def slow(setting):
    _, model, processor, _ = setting
    banned = placeholder_ids(model.config)
    return TransformersEngine(model, processor.tokenizer, eos_token_ids=[-1], banned_token_ids=banned)


def tokens(groups):
    return [completion.token_ids for (completion,) in groups]


def test_transformers_alone_and_in_a_padded_batch(setting, slow):
    """Transformers' own penalty would count the padding of a short prompt as written."""
    prompts = setting[3]
    together = tokens(slow.generate(prompts, GREEDY, seed=0))
    alone = [
        tokens(slow.generate([prompt], replace(GREEDY, max_tokens=limit, repetition_penalty=penalty), seed=0))[0]
        for prompt, limit, penalty in zip(prompts, LIMITS, PENALTIES, strict=True)
    ]
    assert together == alone
    assert [len(ids) for ids in together] == LIMITS


@pytest.mark.parametrize("as_lora", [False, True])
def test_what_the_model_says_of_generation_is_not_added(setting, as_lora):
    """`extra` of the recipe still is."""
    _, model, processor, prompts = setting
    own = GenerationConfig(repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=8, bad_words_ids=[[7]])
    plain = model.generation_config
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if as_lora else model
    banned = placeholder_ids(model.config)
    engine = TransformersEngine(policy, processor.tokenizer, eos_token_ids=[-1], banned_token_ids=banned)
    found = []
    for config in (plain, own):
        model.generation_config = config
        found.append([tokens(engine.generate(prompts, replace(GREEDY, extra=extra), seed=0)) for extra in EXTRAS])
        assert model.generation_config is config
    model.generation_config = plain
    if as_lora:
        policy.unload()
    assert found[0] == found[1]
    assert found[0][0] != found[0][1], "extra did nothing"


def test_a_penalty_is_the_formula(setting, slow):
    """Step by step: positive logits of tokens that stand in the prompt or the completion divided, others multiplied."""
    _, model, _, prompts = setting
    prompt, written, banned = prompts[1], [], placeholder_ids(model.config)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.tensor([prompt.prompt_ids + written])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.vision_inputs).logits[0, -1]
            seen = ids[0].unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 2.0, logits[seen] * 2.0)
            logits[banned] = -torch.inf
            written.append(int(logits.argmax()))
    assert tokens(slow.generate(prompts, GREEDY, seed=0))[1][:12] == written


def test_vllm_does_the_same(setting, slow):
    folder, model, _, prompts = setting
    engine = VllmEngine(
        str(folder), dtype="float32", max_model_len=256, banned_token_ids=placeholder_ids(model.config),
        eos_token_ids=[-1], temperature=1.0, max_images=1, kv_cache_memory_bytes=2**27,
    )  # fmt: skip
    fast = tokens(engine.generate(prompts, replace(GREEDY, extra={"ignore_eos": True}), seed=0))
    assert fast == tokens(slow.generate(prompts, GREEDY, seed=0))
    without = tokens(
        engine.generate(prompts, replace(GREEDY, repetition_penalty=1.0, extra={"ignore_eos": True}), seed=0)
    )
    assert without != fast, "the penalties did nothing"

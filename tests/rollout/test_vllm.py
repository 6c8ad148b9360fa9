"""vLLM in process: the policy's log-probabilities after every update, one answer a seed, no placeholder sampled."""

import copy

import pytest
import torch
from grpo.tiny_run import ROWS, make_trainer
from random_families import save_random_family
from random_vlm import save_random_vlm

from r1v_rl.data.chat import limit_image_tiles
from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.grpo.batch import model_inputs, score
from r1v_rl.models.parts import PARTS, part_of
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.prompts import encode_prompt, placeholder_ids
from r1v_rl.rollout.vllm_inprocess import VllmEngine, _random_states_kept
from r1v_rl.rollout.weights import disk_weights
from r1v_rl.tracking.metrics import read_metrics

VLLM = {"use_vllm": True, "vllm_kv_cache_memory_bytes": 2**27, "vllm_max_model_length": 256, "save_strategy": "no"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainer(model, tmp_path_factory):
    """A run of 20 steps that trains projector and language model, pictures and all."""
    trainer = make_trainer(model, tmp_path_factory.mktemp("run"), max_steps=20, **VLLM)
    trainer.train()
    return trainer


def differences(trainer) -> list[float]:
    name = "sampling/sampling_logp_difference/max"
    return [line[name] for line in read_metrics(trainer.args.output_dir) if name in line]


def test_logprobs_are_the_policys_after_every_update(trainer):
    assert len(differences(trainer)) == 20
    assert max(differences(trainer)) <= 1e-4


def test_only_what_trains_is_sent_again(trainer, monkeypatch):
    """Projector and language model, whole."""
    sent = []
    reload = trainer.engine._llm.collective_rpc
    monkeypatch.setattr(
        trainer.engine._llm,
        "collective_rpc",
        lambda name, kwargs: (
            sent.append(dict(kwargs["weights_iterator"])) or reload(name, kwargs={"weights_iterator": sent[-1].items()})
        ),
    )
    trainer.engine.sync_weights(trainer.model)
    assert {part_of(name) for name in sent[0]} == {"projector", "language_model"}
    assert len(sent[0]) == sum(part_of(name) != "vision_encoder" for name in disk_weights(trainer.model))
    trainer.engine.sync_weights(copy.deepcopy(trainer.model))
    assert {part_of(name) for name in sent[1]} == set(PARTS), "another policy's tower may be another one"
    trainer.engine.sync_weights(trainer.model)


def test_without_the_cache_resets_they_are_not(trainer, model, tmp_path, monkeypatch):
    """Planted: prefixes computed with older weights are used on. A prompt is cached in whole blocks of 128 tokens; it
    is a text-only one here, since pictures end in vLLM's `Encoder cache miss` instead of wrong numbers."""
    monkeypatch.setattr(VllmEngine, "reset_caches", lambda self: None)
    long_question = [{"role": "user", "content": "How many red circles? " * 30}]
    rows = [{**row, "prompt": long_question, "images": []} for row in ROWS]
    stale = make_trainer(model, tmp_path, rows=rows, max_steps=10, **VLLM)
    stale._engine = trainer.engine  # a second engine would cost 10 s
    stale.train()
    monkeypatch.undo()
    assert max(differences(stale)) > 1e-3


def test_frozen_parts_stay_bit_identical(trainer, model):
    """The tower is frozen in that run; the other two parts move."""
    fresh = make_trainer(model, trainer.args.output_dir + "-fresh", **VLLM)
    before, after = fresh.part_hashes(), trainer.part_hashes()
    assert before["vision_encoder"] == after["vision_encoder"]
    assert before["projector"] != after["projector"]
    assert before["language_model"] != after["language_model"]


def test_every_completion_carries_what_the_trainer_needs(trainer):
    prompts = _prompts(trainer)
    trainer._engine_version = None
    trainer._sync_engine()
    groups = trainer.engine.generate(prompts, Sampling(num_generations=3, max_tokens=8), seed=5)
    again = trainer.engine.generate(prompts, Sampling(num_generations=3, max_tokens=8), seed=5)
    other = trainer.engine.generate(prompts, Sampling(num_generations=3, max_tokens=8), seed=6)
    tokens = [[c.token_ids for c in group] for group in groups]
    assert tokens == [[c.token_ids for c in group] for group in again]
    assert tokens != [[c.token_ids for c in group] for group in other]
    assert all(len(set(map(tuple, group))) > 1 for group in tokens), "the completions of a group differ"
    for group in groups:
        for completion in group:
            assert len(completion.logprobs) == len(completion.token_ids) <= 8
            assert completion.is_truncated == (completion.token_ids[-1] not in trainer.engine._eos)


def test_image_placeholders_are_never_sampled(trainer):
    """Planted first: a head that wants nothing else."""
    policy, image_id = trainer.model, placeholder_ids(trainer.model.config)[0]
    head = policy.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.zero_()
        head[image_id] = 10.0 * policy.get_input_embeddings().weight.abs().mean()
    trainer.engine.sync_weights(policy)
    groups = trainer.engine.generate(_prompts(trainer), Sampling(num_generations=4, max_tokens=16), seed=1)
    sampled = {token for group in groups for completion in group for token in completion.token_ids}
    with torch.no_grad():
        head.copy_(kept)
    trainer.engine.sync_weights(policy)
    assert image_id not in sampled


def test_the_random_streams_of_training_are_left_alone(trainer):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    trainer.engine.generate(_prompts(trainer), Sampling(num_generations=2, max_tokens=4), seed=9)
    assert torch.equal(torch.rand(4), wanted)


def test_greedy_completions_equal_those_of_transformers(trainer):
    """The slow twin: `generate` of the same weights."""
    from r1v_rl.rollout.hf import TransformersEngine

    eos, banned = sorted(trainer.engine._eos), placeholder_ids(trainer.model.config)
    slow = TransformersEngine(trainer.model, trainer._tokenizer, eos_token_ids=eos, banned_token_ids=banned)
    greedy = Sampling(num_generations=1, max_tokens=12, temperature=0.0)
    prompts = _prompts(trainer)
    fast = [group[0].token_ids for group in trainer.engine.generate(prompts, greedy, seed=0)]
    assert fast == [group[0].token_ids for group in slow.generate(prompts, greedy, seed=0)]


def test_merged_lora_weights_are_synced_and_the_base_is_untouched(trainer, model, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = make_trainer(model, tmp_path, lora, trainable=None, **VLLM)
    base = {n: w.clone() for n, w in adapted.model.state_dict().items() if "lora" not in n}
    adapted._engine = trainer.engine
    batch = adapted._rollout(0)
    with torch.no_grad():
        inputs = model_inputs(batch, range(8), pad_token_id=0, device="cpu", share_prefix=False)
        logprobs, _ = score(adapted.model, inputs)
    for row, mask, sampled in zip(logprobs, inputs.token_mask, batch.sampler_logprobs, strict=True):
        assert (row[mask] - sampled).abs().max() <= 1e-4
    assert all(torch.equal(w, base[n]) for n, w in adapted.model.state_dict().items() if "lora" not in n)


def _prompts(trainer):
    examples = examples_from_rows(ROWS[:4], images_without_marks="prepend", answer_required=False)
    return [encode_prompt(trainer.processing_class, example, device="cpu") for example in examples]


def test_streamed_text_is_that_of_the_completion(trainer):
    """The same tokens as without streaming, and nothing left in the engine by an answer that was stopped."""
    prompt, *_ = trainer._encode(trainer.train_examples[2:3])
    sampling, pieces = Sampling(num_generations=1, max_tokens=12), []
    completion = trainer.engine.stream(prompt, sampling, seed=3, on_text=pieces.append)
    assert "".join(pieces) == completion.text and len(pieces) > 3
    assert trainer.engine.generate([prompt], sampling, seed=3)[0][0].token_ids == completion.token_ids

    greedy = Sampling(num_generations=1, max_tokens=12, temperature=0.0)
    wanted = trainer.engine.stream(prompt, greedy, seed=0, on_text=lambda _: None)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.engine.stream(prompt, greedy, seed=0, on_text=stop)
    assert trainer.engine.stream(prompt, greedy, seed=0, on_text=lambda _: None) == wanted


def test_groups_are_told_of_as_they_finish_and_are_those_of_llm_generate(trainer):
    """vLLM's own loop, which says nothing before the end, is the slow twin. An exception leaves the engine empty."""
    engine, prompts, told = trainer.engine, _prompts(trainer), []
    sampling = Sampling(num_generations=3, max_tokens=[12, 2, 7, 2])
    groups = engine.generate(prompts, sampling, seed=5, on_group=lambda *group: told.append(group))
    assert [number for number, _ in told][2:] == [2, 0] and sorted(number for number, _ in told) == [0, 1, 2, 3]
    assert all(groups[number] is group for number, group in told)
    with _random_states_kept():
        torch.manual_seed(5)
        parameters = [engine._parameters(sampling, *limits) for limits in sampling.limits(4)]
        outputs = engine._llm.generate([engine._request(p) for p in prompts], parameters, use_tqdm=False)
    assert groups == [[engine._completion(sample) for sample in output.outputs] for output in outputs]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, sampling, seed=5, on_group=stop)
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert engine.generate(prompts, sampling, seed=5) == groups


# A second engine in one process takes the first one's place: nothing that uses `trainer.engine` may follow.


def test_the_engine_reads_pictures_with_the_trainers_processor(trainer, model, tmp_path):
    """`max_image_tiles` changes the processor in memory, not the model's folder."""
    limited = make_trainer(model, tmp_path, **VLLM)
    limit_image_tiles(limited.processing_class, 1)
    prompts = _prompts(limited)
    assert [len(p.vision_inputs.get("pixel_values", ())) for p in prompts] == [1, 0, 2, 1]
    files = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    groups = limited.engine.generate(prompts, Sampling(num_generations=1, max_tokens=2), seed=0)
    assert len(groups) == 4
    assert files == {path.name: path.stat().st_mtime_ns for path in model.iterdir()}, "the model's folder is untouched"


def test_qwen2_5_vl_with_a_tied_head(tmp_path):
    """Three-axis positions, pictures of unlike size, and names on disk that do not tell the part."""
    model = save_random_family(tmp_path / "model", "qwen2_5_vl", tie_word_embeddings=True)
    trainer = make_trainer(model, tmp_path / "run", max_steps=3, **VLLM)
    trainer.train()
    assert len(differences(trainer)) == 3 and max(differences(trainer)) <= 1e-4

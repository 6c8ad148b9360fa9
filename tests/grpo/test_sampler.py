"""Prompts of a generation follow from the seed and its number alone."""

import pytest

from r1v_rl.errors import DataError
from r1v_rl.grpo.sampler import MicroSteps, PromptSampler, generation_seed


def sampler(num_examples: int = 10, prompts: int = 4, shuffle: bool = True, seed: int = 0) -> PromptSampler:
    return PromptSampler(
        num_examples, prompts_per_generation=prompts, micro_steps_per_generation=3, shuffle=shuffle, seed=seed
    )


def test_an_epoch_uses_no_row_twice_and_epochs_differ():
    prompts = [sampler().prompts(generation, 0, 1) for generation in range(4)]
    first, second = prompts[0] + prompts[1], prompts[2] + prompts[3]
    assert len(set(first)) == len(first) == 8
    assert len(set(second)) == 8
    assert first != second


def test_the_order_is_a_function_of_seed_and_generation():
    assert sampler().prompts(7, 0, 1) == sampler().prompts(7, 0, 1)
    assert sampler(seed=1).prompts(7, 0, 1) != sampler(seed=2).prompts(7, 0, 1)
    assert sampler(shuffle=False).prompts(1, 0, 1) == [4, 5, 6, 7]


def test_processes_share_a_generation_without_overlap():
    whole = sampler().prompts(3, 0, 1)
    assert sampler().prompts(3, 0, 2) + sampler().prompts(3, 1, 2) == whole


def test_an_epoch_has_a_micro_step_for_every_use_of_a_generation():
    assert len(MicroSteps(sampler())) == 2 * 3


def test_too_few_rows_are_refused_with_the_arithmetic():
    with pytest.raises(DataError, match=r"4 prompts.*3 rows"):
        sampler(num_examples=3)


def test_neighbouring_generations_and_processes_sample_with_unrelated_seeds():
    seeds = {generation_seed(0, generation, rank) for generation in range(100) for rank in range(4)}
    assert len(seeds) == 400

"""Which prompts belong to which generation: a pure function of the seed, so that a resumed run needs no position."""

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset

from r1v_rl.errors import DataError
from r1v_rl.grpo.config import GRPOConfig


class PromptSampler:
    """Cuts an endless stream of epochs, each a permutation of its own, into generations of P prompts.

    Args:
        num_examples: Rows in the dataset.
        prompts_per_generation: P, over all processes.
        micro_steps_per_generation: Forward-backward passes that use one generation (`steps_per_generation` times
            `num_iterations`).
        shuffle: Permute each epoch.
        seed: Of the permutations.
        blocks: Parts of a generation that updates use one after the other. Processes share out each of them, so that
            an update has the same prompts whatever their number; where that would split a group, the whole.

    Raises:
        DataError: If the dataset has fewer than P rows.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        prompts_per_generation: int,
        micro_steps_per_generation: int,
        shuffle: bool,
        seed: int,
        blocks: int = 1,
    ):
        if num_examples < prompts_per_generation:
            raise DataError(
                f"a generation takes {prompts_per_generation} prompts (generation_batch_size / num_generations) and "
                f"the dataset has {num_examples} rows: add rows or lower per_device_train_batch_size"
            )
        self.num_examples = num_examples
        self.prompts_per_generation = prompts_per_generation
        self.micro_steps_per_generation = micro_steps_per_generation
        self.generations_per_epoch = num_examples // prompts_per_generation
        self._blocks = blocks
        self._shuffle = shuffle
        self._seed = seed

    def prompts(self, generation: int, rank: int, world: int) -> list[int]:
        """Dataset indices of this process's share of a generation; an epoch's incomplete last one is left out."""
        epoch, position = divmod(generation, self.generations_per_epoch)
        order = self._order(self._seed * 1_000_003 + epoch)
        return [order[position * self.prompts_per_generation + place] for place in self.places(rank, world)]

    def places(self, rank: int, world: int) -> list[int]:
        """Which of a generation's prompts are a process's, by their number."""
        blocks = self._blocks if self.prompts_per_generation % (self._blocks * world) == 0 else 1
        block = self.prompts_per_generation // blocks
        share = block // world
        return [start + rank * share + i for start in range(0, blocks * block, block) for i in range(share)]

    def spare(self, generation: int, rank: int, world: int) -> list[int]:
        """Dataset indices that this process may put in the place of prompts of a generation, none of which it has: in
        an order of their own, or, without `shuffle`, from where the generation ends."""
        taken = self.prompts(generation, 0, 1)
        seed = numpy.random.SeedSequence([self._seed, generation]).generate_state(1)[0]
        order = self._order(int(seed))
        if not self._shuffle:
            order = order[taken[-1] :] + order[: taken[-1]]
        known = set(taken)
        return [index for index in order if index not in known][rank::world]

    def _order(self, seed: int) -> list[int]:
        if not self._shuffle:
            return list(range(self.num_examples))
        return torch.randperm(self.num_examples, generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_sampler(num_examples: int, args: GRPOConfig) -> PromptSampler:
    """That of a recipe; of a generation which serves several updates each takes a block, or several."""
    return PromptSampler(
        num_examples,
        prompts_per_generation=args.generation_batch_size // args.num_generations,
        micro_steps_per_generation=args.steps_per_generation * args.num_iterations,
        shuffle=bool(args.shuffle_dataset),
        seed=args.data_seed if args.data_seed is not None else args.seed,
        blocks=args.steps_per_generation // math.gcd(args.steps_per_generation, args.gradient_accumulation_steps),
    )


class MicroSteps(Dataset):
    """What the trainer's dataloader yields: one empty item for each micro-step of an epoch."""

    def __init__(self, sampler: PromptSampler):
        self._length = sampler.generations_per_epoch * sampler.micro_steps_per_generation

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        return {}


def chosen(parts: Sequence[Sequence], places: Sequence[Sequence[int]], wanted: Sequence[int], size: int = 1) -> list:
    """What several processes have of a generation, for one of another number of them.

    Args:
        parts: Of each process, `size` items for each of its prompts.
        places: The numbers of its prompts.
        wanted: Those of the one.
    """
    by_place: dict[int, Any] = {}
    for part, numbers in zip(parts, places, strict=True):
        by_place |= {number: part[i * size : (i + 1) * size] for i, number in enumerate(numbers)}
    return [item for number in wanted for item in by_place[number]]


def generation_seed(seed: int, generation: int, rank: int, *rounds: int) -> int:
    """The sampling seed of one generation (of one of its later rounds) on one process: far apart for neighbours."""
    return int(numpy.random.SeedSequence([seed, generation, rank, *rounds]).generate_state(1)[0])

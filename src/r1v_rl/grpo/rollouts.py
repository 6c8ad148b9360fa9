"""The groups of a generation: sampled on policy or ahead of it, the first whole ones of more that were asked for, and
replaced where they have nothing to teach."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1v_rl.errors import RecipeError
from r1v_rl.grpo.policy import check_versions, make_engine
from r1v_rl.grpo.resume import GRPOResume
from r1v_rl.grpo.rewards import Rewarded
from r1v_rl.grpo.sampler import generation_seed
from r1v_rl.grpo.tail import Tail
from r1v_rl.grpo.verdicts import EarlyVerdicts
from r1v_rl.rollout.engine import BackgroundEngine, OnGroup, PartialEngine, RolloutEngine, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.types import Completion, Example, RolloutGroup


@dataclass(slots=True)
class Rollouts:
    """P prompts of one process with their groups."""

    rows: list[int]
    """Of the dataset."""
    prompts: list[EncodedPrompt]
    groups: list[RolloutGroup]
    early: EarlyVerdicts | None = None
    """Verdicts that began while they were sampled."""


class GroupRollouts(GRPOResume):
    """The part of `GRPOTrainer` that asks the rollout engine for training."""

    eval_examples: Sequence[Example] | None
    eval_sets: dict[str, Sequence[Example]]
    """Small sets answered every `eval_steps` (`eval_on`); where there are none, the held-out rows are."""
    _engine: RolloutEngine | None
    _engine_version: int | None

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine, made at first use, after accelerate's process group."""
        if self._engine is None:
            self._engine = make_engine(
                self.accelerator.unwrap_model(self.model),
                self.processing_class,
                self.args,
                [*self.train_examples, *(self.eval_examples or []), *itertools.chain(*self.eval_sets.values())],
                self.accelerator,
            )
        return self._engine

    def _sync_engine(self) -> None:
        if self._engine_version != self.state.global_step:
            if self._ahead is not None:
                self._ahead.wait()
            self.engine.sync_weights(self.accelerator.unwrap_model(self.model), self.state.global_step)
            self._engine_version = self.state.global_step

    def _sampling(self) -> Sampling:
        args = self.args
        return Sampling(
            num_generations=args.num_generations,
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            extra=args.generation_kwargs or {},
        )

    def _sampled(self, generation: int) -> Rollouts:
        """The groups of one generation; with `max_staleness` they were begun earlier, and later ones are begun now."""
        if self._ahead is not None:
            return self._sampled_ahead(generation)
        if self._tail is not None:
            return self._sampled_first(self._tail, generation)
        rows = self._rows(generation)
        with self.metrics.timed("encode"):
            prompts = self._encode([self.train_examples[i] for i in rows])
        with self.metrics.timed("sync"):
            self._sync_engine()
        with self.metrics.timed("generate"):
            seed = generation_seed(self.args.seed, generation, self.accelerator.process_index)
            rollouts = self._asked(rows, prompts, seed)
        self.metrics.add_all(getattr(self.engine, "metrics", {}))
        return rollouts

    def _asked(self, rows: list[int], prompts: list[EncodedPrompt], seed: int) -> Rollouts:
        """Groups sampled with the weights that the engine holds; verdicts on them have begun where they can."""
        version, early = self._engine_version, self._early(prompts)
        assert version is not None
        try:
            completions = self.engine.generate(prompts, self._sampling(), seed=seed, **_heard(early, prompts, version))
            check_versions(completions, version)
        except BaseException:
            if early is not None:
                early.close()
            raise
        return Rollouts(rows, prompts, _groups(prompts, completions, version), early)

    def _early(self, prompts: Sequence[EncodedPrompt]) -> EarlyVerdicts | None:
        return self.reward_stage.early([prompt.example for prompt in prompts], self.state)

    def _rows(self, generation: int) -> list[int]:
        return self.sampler.prompts(generation, self.accelerator.process_index, self.accelerator.num_processes)

    def _last_generation(self) -> int:
        micro_steps = self.state.max_steps * self.args.gradient_accumulation_steps
        return (micro_steps - 1) // self.sampler.micro_steps_per_generation

    # ---- ahead of the trainer ---------------------------------------------------------------------------------------

    def _sampled_ahead(self, generation: int) -> Rollouts:
        assert self._ahead is not None
        waited_s = 0.0
        if missing := self._ahead.missing(generation, self._last_generation()):
            with self.metrics.timed("encode"):
                encoded = {n: self._encode([self.train_examples[i] for i in self._rows(n)]) for n in missing}
            started = time.perf_counter()
            self._ahead.wait()  # servers take weights while they have nothing in hand
            waited_s = time.perf_counter() - started
            with self.metrics.timed("sync"):
                self._sync_engine()
            if not isinstance(self.engine, BackgroundEngine):
                raise RecipeError(
                    f"`max_staleness` above 0 needs rollout servers (`vllm_mode: server`), this engine "
                    f"({type(self.engine).__name__}) cannot sample while the trainer updates"
                )
            for number, prompts in encoded.items():
                seed = generation_seed(self.args.seed, number, self.accelerator.process_index)
                early, version = self._early(prompts), self.state.global_step
                heard = _heard(early, prompts, version)
                asked = self.engine.generate_async(prompts, self._sampling(), seed=seed, **heard)
                self._ahead.begin(number, prompts, asked, version=version, begun=generation, early=early)
        started = time.perf_counter()
        ahead = self._ahead.take(generation)
        self.metrics.add("rollout/seconds_generate", waited_s + time.perf_counter() - started)
        completions, metrics = ahead.answer.result()
        self.metrics.add_all({**getattr(self.engine, "metrics", {}), **metrics})
        check_versions(completions, ahead.version)
        groups = _groups(ahead.prompts, completions, ahead.version)
        return Rollouts(self._rows(generation), ahead.prompts, groups, ahead.early)

    # ---- long tails -------------------------------------------------------------------------------------------------

    def _make_tail(self) -> Tail:
        world = self.accelerator.num_processes
        tail = Tail(self.sampler.prompts_per_generation // world, self.args.over_provision, self.args.partial_rollouts)
        tail.check(self.sampler, world)
        return tail

    def _sampled_first(self, tail: Tail, generation: int) -> Rollouts:
        """The groups that are whole first; every process has its own."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = tail.fresh_rows(self._rows(generation), self.sampler.spare(generation, rank, world))
        with self.metrics.timed("encode"):
            asked = tail.ask(rows, self._encode([self.train_examples[i] for i in rows]))
        with self.metrics.timed("sync"):
            self._sync_engine()
        if not isinstance(self.engine, PartialEngine):
            raise RecipeError(
                f"`over_provision` needs rollout servers (`vllm_mode: server`), this engine "
                f"({type(self.engine).__name__}) cannot be stopped"
            )
        with self.metrics.timed("generate"):
            found = self.engine.generate_first(
                [one.prompt for one in asked],
                self._sampling(),
                seed=generation_seed(self.args.seed, generation, rank),
                begun=[one.completions for one in asked],
                enough=tail.enough(asked),
            )
        step = self.state.global_step
        check_versions([group for group, one in zip(found, asked, strict=True) if not one.carried], step)
        for one, completions in zip(asked, found, strict=True):
            one.completions = completions
        taken, metrics = tail.take(asked, is_last=generation == self._last_generation())
        self.metrics.add_all({**getattr(self.engine, "metrics", {}), **metrics})
        prompts = [one.prompt for one in taken]
        return Rollouts([one.row for one in taken], prompts, _groups(prompts, [one.completions for one in taken], step))

    # ---- dynamic sampling -------------------------------------------------------------------------------------------

    def _replace_equal_groups(self, generation: int, rollouts: Rollouts, rewarded: Rewarded) -> None:
        """Put fresh prompts in the place of groups whose rewards are all equal, in at most `dynamic_sampling` rounds
        (DAPO, arXiv:2503.14476); a group that no round could better stays. All processes do as many rounds."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        spare = self.sampler.spare(generation, rank, world)
        equal = [place for place, row in enumerate(rewarded.rewards) if not differs(row)]
        found, rounds = len(equal), 0
        self.metrics.add("dynamic_sampling/reward", rewarded.rewards.nanmean())
        while rounds < self.args.dynamic_sampling:
            rows, spare = spare[: len(equal)], spare[len(equal) :]
            asked = torch.tensor(float(len(rows)), device=self.accelerator.device)
            if not self.accelerator.reduce(asked, reduction="sum"):
                break
            rounds += 1
            if self._engine_version is None:  # resumed among generations that were sampled ahead
                self._sync_engine()
            if rows:
                fresh, judged = self._fresh_groups(rows, generation_seed(self.args.seed, generation, rank, rounds))
                for index in (index for index, row in enumerate(judged.rewards) if differs(row)):
                    place = equal.pop(0)
                    rollouts.rows[place], rollouts.prompts[place] = fresh.rows[index], fresh.prompts[index]
                    rollouts.groups[place] = fresh.groups[index]
                    rewarded.replace(place, judged, index)
        self.metrics.add("dynamic_sampling/replaced", (found - len(equal)) / len(rollouts.groups))
        self.metrics.add("dynamic_sampling/rounds", rounds)
        rewarded.advantages = self.reward_stage.advantages(rewarded, self.accelerator)

    def _fresh_groups(self, rows: list[int], seed: int) -> tuple[Rollouts, Rewarded]:
        """Groups of these rows and their rewards."""
        fresh = self._asked(rows, self._encode([self.train_examples[i] for i in rows]), seed)
        return fresh, self.reward_stage.judge(fresh.groups, self.state, fresh.early)


def differs(rewards: torch.Tensor) -> bool:
    """Whether two of a group's rewards (G,) differ; NaN, a reward that could not judge, is left out."""
    return bool(rewards.nan_to_num(nan=torch.inf).min() < rewards.nan_to_num(nan=-torch.inf).max())


def _groups(prompts: Sequence[EncodedPrompt], completions: Sequence[list], version: int) -> list[RolloutGroup]:
    """Args: `version` of the weights that sampled them; a completion may say that it began with older ones."""
    return [_group(prompt, own, version) for prompt, own in zip(prompts, completions, strict=True)]


def _group(prompt: EncodedPrompt, completions: list[Completion], version: int) -> RolloutGroup:
    oldest = min([version, *(c.weight_version for c in completions if c.weight_version is not None)])
    return RolloutGroup(prompt.example, prompt.prompt_ids, completions, oldest)


def _heard(early: EarlyVerdicts | None, prompts: Sequence[EncodedPrompt], version: int) -> dict[str, OnGroup]:
    """What an engine is given so that verdicts begin with each group that it finishes."""
    if early is None:
        return {}
    return {"on_group": lambda number, own: early.add(number, _group(prompts[number], own, version))}

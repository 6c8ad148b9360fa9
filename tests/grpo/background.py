"""Rollouts in the background without a server: a whole twin of the policy samples, with the weights of its last sync,
and reports its log-probabilities. The same seed gives the same bits."""

import asyncio
import copy
import json
from pathlib import Path

from grpo import engine_run
from grpo.tiny_run import early_token_reward

from r1v_rl.errors import UserError
from r1v_rl.grpo.rewards import RewardStage
from r1v_rl.models.sharding import unsharded_twin
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.model_folder import end_token_ids
from r1v_rl.rollout.prompts import placeholder_ids
from r1v_rl.state_files import weight_hash

AHEAD = {"use_vllm": True, "vllm_mode": "server"}
"""What `max_staleness` asks for; the engine is handed to the trainer."""


class BackgroundTransformers(TransformersEngine):
    """Args: `trainer` is given this engine; `pause_s` before each batch but the first; the batch `fails` fails."""

    def __init__(self, trainer, *, pause_s: float = 0.0, fails: int | None = None):
        policy = trainer.accelerator.unwrap_model(trainer.model)
        eos = end_token_ids(policy.generation_config.eos_token_id, trainer._tokenizer)
        banned, tokenizer = placeholder_ids(policy.config), copy.deepcopy(trainer._tokenizer)
        twin = unsharded_twin(policy)
        super().__init__(twin, tokenizer, eos_token_ids=eos, banned_token_ids=banned, twin=True)
        self.pause_s, self.fails = pause_s, fails
        self.asked, self.under_way, self.given_up = 0, 0, 0
        trainer._engine = self

    def sync_weights(self, policy, version=0):
        assert not self.under_way, "weights change under a batch"
        super().sync_weights(policy, version)

    def generate(self, prompts, sampling, *, seed, on_group=None):
        groups = super().generate(prompts, sampling, seed=seed, on_group=on_group)
        rows = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
        found = self.token_logprobs([prompt for prompt, _ in rows], [c.token_ids for _, c in rows])
        for (_, completion), logprobs in zip(rows, found, strict=True):
            completion.logprobs = logprobs
        return groups

    def generate_async(self, prompts, sampling, *, seed, on_group=None):
        """Sampled at once, since transformers draws from the stream that training has; given out later."""
        number, self.asked = self.asked, self.asked + 1
        return self._later(number, self.generate(prompts, sampling, seed=seed), on_group)

    async def _later(self, number, groups, on_group):
        self.under_way += 1
        try:
            await asyncio.sleep(self.pause_s if number else 0.0)
            if number == self.fails:
                raise UserError("no rollout server is left")
            for place, group in enumerate(groups if on_group is not None else ()):
                on_group(place, group)
            return groups
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.under_way -= 1


def resample_on_two(engine: str, model: Path, folder: Path) -> None:
    """Two runs with `dynamic_sampling` on two processes, and what each process saw of them."""
    for name, changes in (("on policy", {}), ("ahead", {**AHEAD, "max_staleness": 1})):
        changes = {"max_steps": 4, "dynamic_sampling": 2, "adam_epsilon": 1e-8, "num_generations": 2, **changes}
        trainer = engine_run.make_trainer(engine, model, folder / name, changes)
        if trainer._ahead is not None:
            BackgroundTransformers(trainer)
            trainer.reward_stage = RewardStage([early_token_reward], trainer.args)
        seen: dict[str, list] = {"rows": []}
        add, rollout = trainer.metrics.add, trainer._rollout

        def noting(metric, value, add=add, seen=seen):
            seen.setdefault(metric.removeprefix("dynamic_sampling/").removesuffix("/max"), []).append(float(value))
            add(metric, value)

        def keeping(generation, rollout=rollout, seen=seen):
            batch = rollout(generation)
            seen["rows"].append(batch.rows)
            return batch

        trainer.metrics.add, trainer._rollout = noting, keeping
        trainer.train()
        seen["weights"] = weight_hash(trainer.accelerator.unwrap_model(trainer.model).state_dict())
        kept = {key: seen[key] for key in ("rounds", "replaced", "staleness", "rows", "weights") if key in seen}
        (folder / f"{name}-{trainer.accelerator.process_index}.json").write_text(json.dumps(kept))

"""Every knob of a GRPO run: TRL's own, with TRL's meaning, and ours on top."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

import trl

from r1v_rl.config import HeldoutConfig
from r1v_rl.errors import RecipeError
from r1v_rl.evaluate.grounding import CONTROLS
from r1v_rl.evaluate.reflections import REFLECTIONS
from r1v_rl.rollout.servers import ServerSettings
from r1v_rl.rollout.vllm_server import LOOPBACK
from r1v_rl.scoring.config import NamedRewardConfig
from r1v_rl.scoring.rules import RewardSettings
from r1v_rl.training.trained_parts import TrainedPartsConfig, check_hub

REFUSED_KEYS = {
    "cache_implementation": "completions come from vLLM, or from transformers' own default cache",
    "ds3_gather_for_generation": "weights are gathered for every rollout engine the same way",
    "log_completions_hub_repo": "every rollout is kept in output_dir/rollouts as parquet; upload that folder",
    "log_multimodal": "the completions table always shows the pictures",
    "log_unique_prompts": "every completion of a rollout is kept in output_dir/rollouts",
    "max_tool_calling_iterations": "tools are not supported",
    "num_generations_eval": "held-out rows are answered greedily, once",
    "off_policy_mask_threshold": "use `vllm_importance_sampling_mode` to correct off-policy tokens",
    "router_aux_loss_coef": "mixture-of-experts models are not supported",
    "trust_remote_code": "code from a model repository is never run",
    "use_adaptive_entropy": "use a fixed `entropy_coef`",
    "use_transformers_continuous_batching": "use `use_vllm: true`",
    "use_transformers_paged": "use `use_vllm: true`",
    "vllm_enable_sleep_mode": "not supported; lower `vllm_gpu_memory_utilization`",
    "vllm_importance_sampling_cap": "TRL renamed it: use `vllm_importance_sampling_clip_max`",
    "vllm_model_impl": "vLLM's own model classes are used",
    "vllm_group_port": "weights go to servers as files (`weight_sync_dir`), not by NCCL",
    "vllm_server_host": "give the address in `vllm_server_base_url`",
    "vllm_server_port": "give the address in `vllm_server_base_url`",
    "vllm_structured_outputs_regex": "a constrained sampler has other log-probabilities than the policy",
}
"""TRL keys that are not implemented, each with the reason. Any value but TRL's default is an error, never ignored."""

_REWARDS = RewardSettings()
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "luspo", "sapo")


@dataclass
class GRPOConfig(TrainedPartsConfig, NamedRewardConfig, trl.GRPOConfig):
    """`trl.GRPOConfig` (1.16) and the keys below. TRL's keys mean what they mean there.

    One default differs: `vllm_importance_sampling_mode` is `token_mask`, since TRL's `sequence_mask` sums the
    sampler's rounding noise over the completion and so drops long chains of thought.
    """

    _VALID_DICT_FIELDS = [*trl.GRPOConfig._VALID_DICT_FIELDS, "serve_kwargs"]  # noqa: RUF012  (transformers' own name)

    vllm_importance_sampling_mode: str = field(
        default="token_mask",
        metadata={"help": "How rollouts are corrected: token_mask, token_truncate, sequence_mask, sequence_truncate."},
    )
    reward_timeout_s: float = field(
        default=_REWARDS.reward_timeout_s,
        metadata={"help": "Seconds after which the worker that judges one answer is killed."},
    )
    reward_failure: str = field(
        default=_REWARDS.reward_failure,
        metadata={
            "help": "When a reward function of yours fails: abort the run, or skip that reward for its rows.",
            "choices": ["abort", "skip"],
        },
    )
    reward_failure_limit: float = field(
        default=_REWARDS.reward_failure_limit,
        metadata={"help": "Share of answers of the last 50 steps that may go unjudged before the run stops; 1 = all."},
    )
    reward_workers: int = field(default=_REWARDS.reward_workers, metadata={"help": "Processes that judge answers."})
    format_pattern: str = field(
        default=_REWARDS.format_pattern,
        metadata={"help": "Regular expression of a well-formed completion; by default a think block, then a box."},
    )
    answer_kind: str = field(
        default=_REWARDS.answer_kind, metadata={"help": "How answers are judged: math, number, choice, text."}
    )
    vllm_kv_cache_memory_bytes: int | None = field(
        default=None, metadata={"help": "KV cache of the in-process vLLM, in bytes; unset = vLLM's own measure."}
    )
    vllm_server_base_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "With `vllm_mode: server`: addresses of servers started by `r1v-rl chat --serve --takes_weights "
            "true`, http://HOST:PORT each; the key in VLLM_API_KEY. Unset = the run starts its own."
        },
    )
    vllm_num_servers: int = field(
        default=1, metadata={"help": "Servers that the run starts, on this machine, where no address is given."}
    )
    vllm_server_devices: list[str] | None = field(
        default=None,
        metadata={"help": 'GPUs of each server that the run starts, as in ["1", "2,3"]; unset = those of the run.'},
    )
    serve_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "More options of vLLM's server where the run starts it, such as {data-parallel-size: 2}."},
    )
    rollout_timeout_s: float = field(
        default=45.0,
        metadata={
            "help": "Seconds that a rollout server may make no progress before its prompts go to another, and that one "
            "by address may be gone before the run ends for want of servers."
        },
    )
    weight_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder through which servers get weights; unset = main memory (/dev/shm) for servers on this "
            "machine, output_dir for others, which must see it under the same path."
        },
    )
    max_staleness: int = field(
        default=0,
        metadata={
            "help": "Generations that rollout servers (`vllm_mode: server`) may be ahead of the trainer: they sample "
            "the next ones while it updates, with weights that are at most as many generations old, and the loss is "
            "corrected token by token (`vllm_importance_sampling_mode`). 0 = on policy."
        },
    )
    over_provision: float = field(
        default=0.0,
        metadata={
            "help": "Groups to ask rollout servers (`vllm_mode: server`) for beyond those that a generation takes, as "
            "a share of them, at most 1: the first whole ones are taken, so that long completions do not hold up the "
            "step, and the others are stopped. What is trained on is shorter than what the policy would write, unless "
            "`partial_rollouts` is set. 0 = off."
        },
    )
    partial_rollouts: int = field(
        default=0,
        metadata={
            "help": "Generations that a group left by `over_provision` may be carried over: its completions are "
            "continued with newer weights, and the loss is corrected token by token "
            "(`vllm_importance_sampling_mode`). 0 = it is thrown away."
        },
    )
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": "Rounds in which groups whose rewards are all equal, and so teach nothing, are replaced by fresh "
            "prompts (DAPO); 0 = off."
        },
    )
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Run the prompt and its images once for all completions of a group. The numbers are the same; a "
            "model that cannot do it falls back to padded rows, and one line says why."
        },
    )
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Token budget of one forward and backward pass: a micro-batch above it is run in several, and the "
            "gradient is the same. Unset = one pass. A prompt counts, and is run, once in each pass that its "
            "completions are in."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Do not run completions that cannot move the weights: advantage 0, or left out of the loss. Same "
            "loss and gradients; `entropy`, `clip_ratio` and `sampling` metrics are over those that ran. Without "
            "effect where beta, entropy_coef or top_entropy_quantile need every completion."
        },
    )
    grounding_every: int = field(
        default=0,
        metadata={
            "help": "Steps between two measurements of whether the pictures matter: held-out rows asked again without "
            "theirs, logged as `grounding/gap` and the like; 0 = never."
        },
    )
    grounding_size: int = field(default=128, metadata={"help": "Held-out rows with pictures to ask."})
    grounding_controls: list[str] = field(
        default_factory=lambda: list(CONTROLS),
        metadata={"help": "What to put in a picture's place: blank, shuffled, dropped. The first is `grounding/gap`."},
    )
    critical_tokens: list[str] = field(
        default_factory=lambda: list(REFLECTIONS),
        metadata={
            "help": "Words that open a reflection; the policy's entropy there is `eval_critical_token_entropy` "
            "(Skywork R1V3 chooses its checkpoint by it)."
        },
    )
    save_rollouts: bool = field(default=True, metadata={"help": "Keep every rollout in output_dir/rollouts."})

    def __post_init__(self) -> None:
        goes_by_metric = self.load_best_model_at_end or self.save_strategy == "best"
        if goes_by_metric and getattr(self, "metric_for_best_model", None) is None:
            self.__dict__["metric_for_best_model"] = "accuracy"  # transformers would look for a loss
        try:
            super().__post_init__()
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self._refuse_unimplemented()
        self._check_values()

    def _refuse_unimplemented(self) -> None:
        defaults = {f.name: f.default for f in fields(trl.GRPOConfig)}
        for key, reason in REFUSED_KEYS.items():
            if getattr(self, key) != defaults[key]:
                raise RecipeError(f"`{key}` is a TRL key that r1v_rl does not implement: {reason}.")
        if self.vllm_mode not in ("colocate", "server"):
            raise RecipeError(f"`vllm_mode` must be colocate (in process) or server, not `{self.vllm_mode}`.")
        if self.pad_to_multiple_of is not None:
            raise RecipeError(
                f"`pad_to_multiple_of` must be unset, not {self.pad_to_multiple_of}: rows are not padded."
            )

    def server_settings(self) -> ServerSettings:
        """The rollout servers of `vllm_mode: server`."""
        urls = [self.vllm_server_base_url] if isinstance(self.vllm_server_base_url, str) else self.vllm_server_base_url
        far = any(urlsplit(url).hostname not in LOOPBACK for url in urls or [])
        return ServerSettings(
            urls=urls or (),
            num_servers=self.vllm_num_servers,
            devices=self.vllm_server_devices,
            options=self.serve_kwargs if isinstance(self.serve_kwargs, dict) else {},
            timeout_s=self.rollout_timeout_s,
            start_timeout_s=self.vllm_server_timeout,
            weight_folder=self.weight_sync_dir or (str(self.output_dir) if far else None),
            log_folder=Path(str(self.output_dir)),
        )

    @property
    def needs_every_completion(self) -> bool:
        """Whether completions of advantage 0 move the loss, by the KL term, the entropy, or a quantile over tokens."""
        return bool(self.beta or self.entropy_coef or self.top_entropy_quantile < 1.0)

    def _check_values(self) -> None:
        if self.vllm_mode == "server" and self.use_vllm:
            self.server_settings()
        elif self.use_vllm and self.vllm_tensor_parallel_size > 1:
            raise RecipeError(
                f"`vllm_tensor_parallel_size` ({self.vllm_tensor_parallel_size}) needs `vllm_mode: server`: rollouts "
                "in the training process have its one device."
            )
        self._check_staleness()
        self._check_tail()
        if self.loss_type not in LOSS_TYPES:
            raise RecipeError(f"`loss_type` must be one of {', '.join(LOSS_TYPES)}, not `{self.loss_type}`.")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise RecipeError(
                f"`importance_sampling_level` must be token or sequence, not `{self.importance_sampling_level}`."
            )
        if self.scale_rewards not in ("group", "batch", "none"):
            raise RecipeError(f"`scale_rewards` must be group, batch or none, not `{self.scale_rewards}`.")
        self.check_parts()
        check_hub(self)
        if self.grounding_every < 0 or self.grounding_size < 2 or set(self.grounding_controls) - set(CONTROLS):
            raise RecipeError(
                f"`grounding_every` must be 0 or more, `grounding_size` at least 2, `grounding_controls` of "
                f"{', '.join(CONTROLS)}; received {self.grounding_every}, {self.grounding_size}, "
                f"{self.grounding_controls}."
            )
        if self.max_tokens_per_forward is not None and self.max_tokens_per_forward < 1:
            raise RecipeError(f"`max_tokens_per_forward` must be at least 1, not {self.max_tokens_per_forward}.")
        if self.max_tokens_per_forward and self.top_entropy_quantile < 1.0:
            raise RecipeError(
                "`top_entropy_quantile` below 1 compares all tokens of a micro-batch, `max_tokens_per_forward` splits "
                "it: unset one of them."
            )
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if rows % self.num_generations:
            raise RecipeError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) x steps_per_generation "
                f"({self.steps_per_generation}) must be a multiple of num_generations ({self.num_generations}), "
                f"so that every group stays whole on one process."
            )
        if self.sync_ref_model and self.beta == 0.0:
            raise RecipeError("`sync_ref_model` needs a reference model: set `beta` above 0.")

    def _check_staleness(self) -> None:
        if self.max_staleness < 0 or self.dynamic_sampling < 0:
            raise RecipeError(
                f"`max_staleness` and `dynamic_sampling` must be 0 or more; received {self.max_staleness} and "
                f"{self.dynamic_sampling}."
            )
        if self.max_staleness and not (self.use_vllm and self.vllm_mode == "server"):
            raise RecipeError(
                f"`max_staleness` ({self.max_staleness}) needs rollouts that are made while the trainer updates: set "
                "`use_vllm: true` and `vllm_mode: server`, or `max_staleness: 0`."
            )
        if self.max_staleness and not self.vllm_importance_sampling_correction:
            raise RecipeError(
                f"`max_staleness` ({self.max_staleness}) samples with older weights than it trains, which the loss "
                "must correct: set `vllm_importance_sampling_correction: true`."
            )

    def _check_tail(self) -> None:
        more, carried = self.over_provision, self.partial_rollouts
        if not 0.0 <= more <= 1.0 or carried < 0:
            raise RecipeError(
                f"`over_provision` must be from 0 to 1, `partial_rollouts` 0 or more; received {more} and {carried}."
            )
        if carried and not more:
            raise RecipeError(
                f"`partial_rollouts` ({carried}) continues what a generation does not take: set `over_provision` above "
                "0, such as 0.25, or `partial_rollouts: 0`."
            )
        if more and not (self.use_vllm and self.vllm_mode == "server"):
            raise RecipeError(
                f"`over_provision` ({more}) needs completions that can be stopped: set `use_vllm: true` and "
                "`vllm_mode: server`, or `over_provision: 0`."
            )
        for key in ("max_staleness", "dynamic_sampling"):
            if more and getattr(self, key):
                raise RecipeError(
                    f"`over_provision` ({more}) and `{key}` ({getattr(self, key)}) exclude each other: set one of them "
                    "to 0."
                )
        if carried and not self.vllm_importance_sampling_correction:
            raise RecipeError(
                f"`partial_rollouts` ({carried}) trains on tokens of older weights, which the loss must correct: set "
                "`vllm_importance_sampling_correction: true`."
            )
        counting = {"presence_penalty", "frequency_penalty"} & set(self.generation_kwargs or {})
        if carried and counting:
            raise RecipeError(
                f"`generation_kwargs` has {', '.join(sorted(counting))}, which counts a completion's own tokens, and "
                "of one that is continued only the new ones: remove it, or set `partial_rollouts: 0`."
            )


@dataclass
class RunConfig(HeldoutConfig):
    """What a GRPO run is made of beside the trainer's own keys."""

    eval_on: list[str] | None = field(
        default=None,
        metadata={
            "help": "Small sets to answer every `eval_steps` (with `eval_strategy: steps`) in place of the held-out "
            "rows, each a benchmark of `evaluate` or named as `eval_dataset_name` is: logged as "
            "`eval_NAME_accuracy`, their mean as `eval_accuracy`. `load_best_model_at_end` goes by it."
        },
    )
    eval_on_size: int = field(default=64, metadata={"help": "Rows to take of each of `eval_on`."})
    eval_on_root: str | None = field(
        default=None, metadata={"help": "Folder with a folder for each benchmark of `eval_on`; unset = from the hub."}
    )

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Rewards: accuracy, format, module.function, or path/file.py:function."},
    )

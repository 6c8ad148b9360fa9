"""The keys that every trainer has: which parts train, how fast, and what a frozen vision encoder costs."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from r1v_rl.errors import RecipeError
from r1v_rl.models.parts import PARTS

VISION_FEATURES = ("recompute", "cache")


def check_hub(args: TrainingArguments) -> None:
    """Raises RecipeError where checkpoints are to be pushed to the hub."""
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise RecipeError(
            f"`hub_strategy: {HubStrategy(args.hub_strategy).value}` would push checkpoints, and only the final model "
            f"is pushed: set `hub_strategy: end`."
        )


@dataclass
class TrainedPartsConfig:
    """Stands before TRL's class among a config's bases; `check_parts` is called when all keys have their values."""

    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts that train: any of vision_encoder, projector, language_model; the rest stays frozen. "
            "Unset = projector and language_model, or the LoRA adapter where there is one."
        },
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; `learning_rate` where unset."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision encoder; `learning_rate` where unset."}
    )
    vision_features: str = field(
        default="recompute",
        metadata={
            "help": "What a frozen vision encoder sees in a picture: recompute it at each use (GRPO: once a rollout), "
            "or cache it in main memory, for pictures that come again.",
            "choices": list(VISION_FEATURES),
        },
    )
    vision_cache_memory_bytes: int = field(
        default=4 * 2**30,
        metadata={
            "help": "Memory of `vision_features: cache` in bytes, per process. Above it GRPO keeps what was used "
            "last, `sft` and `align` what was seen first."
        },
    )
    rank_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "Seconds that one of several ranks may be stopped (SIGSTOP) before all of them end. One that runs "
            "and does not get further: `ddp_timeout`."
        },
    )

    def check_parts(self) -> None:
        """Raises RecipeError where these keys do not fit together."""
        if not self.rank_timeout_s > 0:
            raise RecipeError(f"`rank_timeout_s` must be above 0, not {self.rank_timeout_s:g}.")
        if self.trainable is not None and (not self.trainable or set(self.trainable) - set(PARTS)):
            raise RecipeError(f"`trainable` must name parts of {', '.join(PARTS)}; received {self.trainable}.")
        if self.vision_features not in VISION_FEATURES:
            raise RecipeError(
                f"`vision_features` must be {' or '.join(VISION_FEATURES)}, not `{self.vision_features}`."
            )
        if self.vision_features == "cache" and "vision_encoder" in (self.trainable or ()):
            raise RecipeError("`vision_features: cache` is for a frozen vision encoder; take it out of `trainable`.")

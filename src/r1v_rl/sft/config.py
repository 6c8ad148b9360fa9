"""Every knob of the supervised stages: TRL's own, with TRL's meaning, and ours on top."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

import trl

from r1v_rl.errors import RecipeError
from r1v_rl.recipe_values import convert
from r1v_rl.training.trained_parts import TrainedPartsConfig, check_hub

REFUSED_KEYS = {
    "assistant_only_loss": "the loss is on the last turn of the assistant alone, in every row",
    "auto_find_batch_size": "a smaller batch would be another run; lower `per_device_train_batch_size`",
    "completion_only_loss": "the loss is on the completion alone, in every row",
    "dataset_num_proc": "rows are read by one process, pictures by `dataloader_num_workers`",
    "dataset_text_field": "rows are conversations; name the prompt's column in `dataset_prompt_column`",
    "eval_packing": "held-out rows are packed as the training rows are",
    "ignore_data_skip": "a resumed run goes on with the rows that come next",
    "label_smoothing_factor": "it needs the logits of the whole vocabulary, which are never stored",
    "length_column_name": "lengths are counted",
    "packing_strategy": "rows are packed whole, best fit first: none is cut or split",
    "pad_to_multiple_of": "set `packing` or `padding_free`, and rows are not padded",
    "pad_token": "TRL deprecated it; the tokenizer's own is used",
    "router_aux_loss_coef": "mixture-of-experts models are not supported",
    "truncation_mode": "no row is cut: one above `max_length` is refused, or left out by `filter_overlong_rows`",
    "trust_remote_code": "code from a model repository is never run",
    "use_liger_kernel": "the loss needs no logits, and TRL deprecated it",
}
"""Keys that are not implemented, each with the reason. Any value but the default is an error, never ignored."""
_EQUAL_TO_DEFAULT = {"completion_only_loss": (True,), "pad_to_multiple_of": (None,), "eval_packing": ()}
SAMPLING = ("random", "sequential")
LOSS_WEIGHTING = ("token", "sqrt_length")


@dataclass
class SFTConfig(TrainedPartsConfig, trl.SFTConfig):
    """`trl.SFTConfig` (1.16) and the keys below. TRL's keys mean what they mean there; `packing` takes pictures too.

    With `packing` a batch is `per_device_train_batch_size` rows of at most `max_length` tokens, each with as many
    samples as fit; without, it is so many samples.
    """

    dataset_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `scenes`, such as {chains: mixed, num_images: 1}."}
    )
    loss_weighting: str = field(
        default="token",
        metadata={
            "help": "Weight of a token in the loss: token = the same for all; sqrt_length = 1 / sqrt(tokens of its "
            "completion), between one vote a token and one vote a sample (InternVL's `square`).",
            "choices": list(LOSS_WEIGHTING),
        },
    )
    filter_overlong_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows of more than `max_length` tokens and say how many; else they are refused."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*trl.SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    def __post_init__(self) -> None:
        self._refuse_unimplemented()
        try:
            super().__post_init__()
        except ValueError as error:
            raise RecipeError(str(error)) from error
        # The recipe's value is for the data reader. TRL gets told that there is nothing left to prepare.
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = convert(self.chat_template_kwargs, dict)
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        self._check_values()

    def _refuse_unimplemented(self) -> None:
        defaults = {f.name: f.default for f in fields(trl.SFTConfig)}
        for key, reason in REFUSED_KEYS.items():
            value = getattr(self, key)
            if value != defaults[key] and value not in _EQUAL_TO_DEFAULT.get(key, ()):
                raise RecipeError(f"`{key}` is a TRL key that r1v_rl does not implement: {reason}.")

    def _check_values(self) -> None:
        for key, choices in {
            "train_sampling_strategy": SAMPLING,
            "loss_weighting": LOSS_WEIGHTING,
            "loss_type": ("nll", "dft"),
        }.items():
            if (value := getattr(self, key)) not in choices:
                raise RecipeError(f"`{key}` must be {' or '.join(choices)}, not `{value}`.")
        self.check_parts()
        check_hub(self)
        if self.packing and self.max_length is None:
            raise RecipeError("`packing` needs `max_length`: the tokens of a packed row.")


@dataclass
class AlignConfig(SFTConfig):
    """`SFTConfig` with the defaults of projector alignment: the projector alone trains, on packed rows."""

    trainable: list[str] | None = field(
        default_factory=lambda: ["projector"],
        metadata={"help": "Parts that train: any of vision_encoder, projector, language_model; the rest stays frozen."},
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Fill rows of `max_length` tokens with whole samples, which do not see each other."},
    )


@dataclass
class PartsConfig:
    """The parts that `align` joins where it does not go on from a model."""

    vision_encoder: str | None = field(
        default=None, metadata={"help": "Folder of the vision encoder; `tiny/vision_encoder` is the shipped one."}
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "Folder of the language model; `tiny/substitute_llm`, `tiny/reasoning_llm` are shipped."},
    )

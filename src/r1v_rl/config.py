"""Recipe file and command line -> config dataclasses: flat keys, each known, of its type, and given once."""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from r1v_rl.errors import RecipeError, UserError
from r1v_rl.recipe_values import convert, describe, plain, read_yaml, takes_list
from r1v_rl.secret_values import check_holds_no_secret

MISPLACED_KEYS: Mapping[str, str] = {
    "env": "set environment variables in the shell; a recipe cannot change them",
    "config": "a recipe cannot include another one; each is complete by itself",
    "torch_dtype": "its name is `dtype` now",
    "max_prompt_length": "prompts are never cut: a row that does not fit the context is refused by its id",
    "dataset_mixture": "mix the rows into one file; the order of rows is drawn from `seed`",
    "datasets": "mix the rows into one file and name it in `dataset_name`",
}
"""Keys that users of other libraries type and that no config class has, each with what to do instead."""

OPERATIONAL_KEYS = frozenset(
    {
        "judge_base_url", "judge_api_key_env", "judge_concurrency", "judge_timeout_s", "judge_max_retries",
        "reviser_base_url", "reviser_api_key_env", "generator_base_url", "generator_api_key_env", "serve_timeout_s",
        "judge_price", "reviser_price", "generator_price", "budget_calls", "budget_tokens", "budget_usd", "replies",
        "vllm_gpu_memory_utilization", "vllm_kv_cache_memory_bytes", "vllm_tensor_parallel_size",
        "reward_model_batch_size", "report_to", "logging_steps", "disable_tqdm", "save_total_limit",
    }
)  # fmt: skip
"""Keys that say where, how fast and at what price a command runs, not what comes out: a run that goes on may set them
otherwise, and nothing is made again because of them."""

_SWITCH_NAMES: Mapping[str, dict[bool, str]] = {"scale_rewards": {True: "group", False: "none"}}
"""Text keys that TRL lets a user write as a boolean."""


@dataclass
class DataConfig:
    """Which rows a run reads, and how they become chat messages."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "`scenes`, a jsonl, csv or parquet file, a folder of them, a save_to_disk folder, a hub id."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub data set (the `name` of `load_dataset`)."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; for `scenes`, `train` or `heldout`."}
    )
    dataset_root: str | None = field(
        default=None,
        metadata={"help": "Folder that image paths start from and stay in; by default the folder of the data file."},
    )
    dataset_size: int | None = field(
        default=None,
        metadata={"help": "Rows to take: the first ones of a file (all), newly made ones of `scenes` (4096)."},
    )
    dataset_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `scenes`, such as {kinds: [count], num_images: 1}."}
    )
    dataset_prompt_column: str | None = field(
        default=None, metadata={"help": "Column that holds the prompt, where none of the known names fits."}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before rows that have none of their own."}
    )
    instruction: str | None = field(
        default=None,
        metadata={
            "help": "Text put after the question of every row, such as how to reason and where to put the answer."
        },
    )
    images_without_marks: str = field(
        default="refuse",
        metadata={
            "help": "A row with images and no `<image>` mark: refuse it, or prepend the images to its text.",
            "choices": ["refuse", "prepend"],
        },
    )
    max_image_tiles: int | None = field(
        default=None,
        metadata={"help": "Most tiles an image is cut into, where the processor cuts (InternVL); unset = its own."},
    )
    contamination_check: str = field(
        default="warn",
        metadata={
            "help": "Training rows that are held-out rows too, by words or by picture, are named before training.",
            "choices": ["warn", "refuse", "off"],
        },
    )
    contamination_benchmarks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Benchmarks that training rows are compared with too: names, or name=folder, file or hub id."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_kwargs, str):
            self.dataset_kwargs = convert(self.dataset_kwargs, dict)
        for key in ("dataset_size", "max_image_tiles"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise RecipeError(f"{key} must be at least 1, received {value}")
        if self.images_without_marks not in ("refuse", "prepend"):
            raise RecipeError(f"images_without_marks must be refuse or prepend, received {self.images_without_marks!r}")


@dataclass
class HeldoutConfig:
    """Which rows a model is measured on; the other keys of `DataConfig` hold for them too."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows, measured greedily and never trained on."}
    )
    eval_dataset_split: str = field(default="heldout", metadata={"help": "Their split."})
    eval_dataset_size: int | None = field(default=None, metadata={"help": "Rows to take of them; unset = all."})
    eval_dataset_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of `scenes`, such as {num_images: 1}."}
    )


def parse_recipe(config_classes: Sequence[type], argv: Sequence[str], *, prog: str = "r1v-rl") -> tuple[Any, ...]:
    """One instance of each class, from `--config FILE.yaml --key value ...`; the command line overrides the file.

    Raises:
        RecipeError: Naming the key, the value and what would do instead.
    """
    return build_configs(config_classes, read_recipe(config_classes, argv, prog=prog))


def read_recipe(config_classes: Sequence[type], argv: Sequence[str], *, prog: str = "r1v-rl") -> dict[str, Any]:
    """The keys that file and command line set, checked and converted: what a run writes to its `config.yaml`."""
    file_name, arguments = _split_off_config(list(argv), prog)
    values = checked_values(config_classes, read_yaml(Path(file_name)) if file_name is not None else {})
    return values | checked_values(config_classes, _parse_arguments(config_classes, arguments, prog))


def checked_values(config_classes: Sequence[type], values: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe keys and values as the classes' fields want them; refuses unknown keys, values of another type and
    secrets."""
    check_holds_no_secret(values)
    types = _annotations(config_classes)
    checked = {key: _checked(key, value, types) for key, value in values.items()}
    check_holds_no_secret(checked)  # a mapping given as text is one now
    return checked


def build_configs(config_classes: Sequence[type], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """One instance of each class from checked values; what a class itself objects to becomes a `RecipeError`."""
    built = []
    for config_class in config_classes:
        names = {f.name for f in fields(config_class) if f.init}
        missing = [f.name for f in fields(config_class) if f.init and _is_required(f) and f.name not in values]
        if missing:
            raise RecipeError(f"the recipe must set {', '.join(missing)}")
        try:
            built.append(config_class(**{key: value for key, value in values.items() if key in names}))
        except UserError:
            raise
        except ValueError as error:
            raise RecipeError(str(error)) from error
    return tuple(built)


def dump_recipe(values: Mapping[str, Any]) -> str:
    """YAML that `read_recipe` turns into the same values."""
    shown = {key: plain(value) for key, value in values.items()}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120)


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing where no key is near."""
    near = difflib.get_close_matches(key.replace("-", "_"), list(keys), n=1, cutoff=0.6)
    return f" Did you mean `{near[0]}`?" if near else ""


# --- the command line -----------------------------------------------------------------------------------------------


def _split_off_config(arguments: list[str], prog: str) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise RecipeError(f"--config must be followed by a YAML file: {error}") from error
    if len(known.config) > 1:
        raise RecipeError(f"--config must be given once, received {', '.join(known.config)}")
    return (known.config[0] if known.config else None), rest


def _parse_arguments(config_classes: Sequence[type], arguments: list[str], prog: str) -> dict[str, Any]:
    """The keys on the command line alone, as text: no default hides a value of the file."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise RecipeError(re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message))

    parser = Parser(
        list(config_classes),
        prog=prog,
        allow_abbrev=False,
        usage="%(prog)s --config FILE.yaml [--key value ...]",
        conflict_handler="resolve",  # TRL's own config may have a key of `DataConfig`
    )
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        raise SystemExit(0)
    types = _annotations(config_classes)
    for action in parser._actions:
        action.default, action.required, action.type, action.choices = argparse.SUPPRESS, False, None, None
        if action.dest in types and takes_list(types[action.dest][0]):
            action.nargs = "+"
    namespace, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("--"):
            _refuse_unknown(argument[2:].split("=")[0], types)
        raise RecipeError(f"values follow their key (`--key value`), received {argument!r} without one")
    return vars(namespace)


# --- keys and types -------------------------------------------------------------------------------------------------


def _annotations(config_classes: Sequence[type]) -> dict[str, tuple[Any, Field]]:
    """Key -> (annotation, field) over all classes."""
    known: dict[str, tuple[Any, Field]] = {}
    for config_class in config_classes:
        hints = get_type_hints(config_class)
        known |= {f.name: (hints[f.name], f) for f in fields(config_class) if f.init}
    return known


def _is_required(declared: Field) -> bool:
    return declared.default is MISSING and declared.default_factory is MISSING


def _refuse_unknown(key: str, types: Mapping[str, Any]) -> None:
    if key in MISPLACED_KEYS:
        raise RecipeError(f"`{key}` is not a recipe key: {MISPLACED_KEYS[key]}")
    raise RecipeError(f"`{key}` is not a recipe key.{nearest_key(key, types)}")


def _checked(key: str, value: Any, types: Mapping[str, tuple[Any, Field]]) -> Any:
    """The value as the key's annotation wants it."""
    if key not in types:
        _refuse_unknown(key, types)
    annotation, declared = types[key]
    if isinstance(value, bool) and key in _SWITCH_NAMES:
        value = _SWITCH_NAMES[key][value]
    try:
        value = convert(value, annotation)
    except ValueError as error:
        hint = f": {error}" if str(error) else "; quote it if it is meant as text" if isinstance(value, bool) else ""
        received = f"{value!r} ({type(value).__name__}){hint}"
        raise RecipeError(f"`{key}` must be {describe(annotation)}, received {received}") from error
    choices = declared.metadata.get("choices")
    if choices and value is not None and value not in choices:
        names = ", ".join(map(str, choices))
        raise RecipeError(
            f"`{key}` must be one of {names}, received {value!r}.{nearest_key(str(value), map(str, choices))}"
        )
    return value

"""The chain file: which stages there are, whose folders feed which keys, and how their models are measured."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1v_rl.errors import RecipeError
from r1v_rl.recipe_values import read_yaml
from r1v_rl.secret_values import check_holds_no_secret

STAGE_COMMANDS: Mapping[str, bool] = {
    "compose": True,
    "align": True,
    "transfer": False,
    "distill": True,
    "sft": True,
    "iterate": True,
    "grpo": True,
}
"""Commands that leave a stage folder in `output_dir`, and whether they have a `seed`; `distill` leaves no model."""
CHAIN_KEYS = ("output_dir", "seed", "evaluate", "stages")
STAGE_KEYS = ("name", "command", "config", "from", "overrides", "accelerate", "evaluate", "evaluate_with")


@dataclass(frozen=True)
class Stage:
    """One command with its recipe, and the earlier stages that it starts from."""

    name: str
    command: str
    config: Path
    folder: Path
    """Its `output_dir`."""
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name of an earlier stage -> {recipe key: path inside that stage's folder}."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Recipe keys that the chain sets itself, `output_dir`, seed and parents' folders included."""
    accelerate: Path | None = None
    """File for `accelerate launch --config_file`; None runs the command in one process."""
    models: tuple[str, ...] = (".",)
    """Folders inside its own that hold a model to be measured; `.` is the stage's result."""
    evaluate_with: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the evaluation that are other ones for this stage, such as the instruction that its model is used to."""

    def values(self) -> dict[str, Any]:
        """The recipe with what the chain sets: what the command will read."""
        return {**read_yaml(self.config), **self.overrides}


@dataclass(frozen=True)
class Chain:
    """A list of stages, each fed by earlier ones."""

    path: Path
    output_dir: Path
    stages: tuple[Stage, ...]
    evaluate: Mapping[str, Any] | None
    """Recipe of `r1v-rl evaluate` for every stage's model; None measures nothing."""

    def stage(self, name: str) -> Stage:
        """The stage of this name.

        Raises:
            RecipeError: If there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise RecipeError(f"{self.path} has no stage `{name}`{_nearest(name, [s.name for s in self.stages])}")


def read_chain(
    path: Path,
    *,
    output_dir: str | None = None,
    seed: int | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Chain:
    """The chain in a file; the arguments override what it says.

    Args:
        seed: Of every stage and of the evaluation, instead of their recipes' own.
        overrides: Name of a stage, or `evaluate` -> recipe keys.

    Raises:
        RecipeError: Naming file, stage and key.
    """
    content = read_yaml(path)
    _check_keys(content, CHAIN_KEYS, str(path))
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"{path}: `stages` must be a list of stages, received {entries!r}")
    root = Path(output_dir or content.get("output_dir") or "")
    if root == Path():
        raise RecipeError(f"{path} must set `output_dir`, the folder that takes one folder a stage")
    seed = content.get("seed") if seed is None else seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise RecipeError(f"{path}: `seed` must be a whole number, received {seed!r}")
    overrides = overrides or {}
    check_holds_no_secret(overrides)  # a stage's command line shows them
    stages: dict[str, Stage] = {}
    for number, entry in enumerate(entries, start=1):
        stage = _read_stage(entry, f"{path}: stage {number}", path.parent, root, seed, stages, overrides)
        if stage.name in stages or stage.name == "evaluate":
            raise RecipeError(f"{path}: stage {number}: the name `{stage.name}` is taken; names are unique")
        stages[stage.name] = stage
    for name in overrides:
        if name not in stages and name != "evaluate":
            raise RecipeError(f"{path} has no stage `{name}`{_nearest(name, [*stages, 'evaluate'])}")
    return Chain(path, root, tuple(stages.values()), _evaluation(content, path, seed, overrides))


def _read_stage(
    entry: Any,
    where: str,
    base: Path,
    root: Path,
    seed: int | None,
    earlier: Mapping[str, Stage],
    overrides: Mapping[str, Mapping[str, Any]],
) -> Stage:
    if not isinstance(entry, dict):
        raise RecipeError(f"{where} must be a mapping with {', '.join(STAGE_KEYS[:3])}, received {entry!r}")
    _check_keys(entry, STAGE_KEYS, where)
    missing = [key for key in STAGE_KEYS[:3] if not isinstance(entry.get(key), str)]
    if missing:
        raise RecipeError(f"{where} must set {', '.join(missing)}")
    name, command = entry["name"], entry["command"]
    if not name.replace("-", "").replace("_", "").isalnum():
        raise RecipeError(f"{where}: `name` is a folder's name of letters, digits, - and _, received {name!r}")
    if command not in STAGE_COMMANDS:
        hint = _nearest(command, STAGE_COMMANDS)
        raise RecipeError(f"{where}: `command` must be one of {', '.join(STAGE_COMMANDS)}, received {command!r}{hint}")
    sources = _sources(entry.get("from") or {}, where, earlier)
    values: dict[str, Any] = {} if seed is None or not STAGE_COMMANDS[command] else {"seed": seed}
    for parent, keys in sources.items():
        values |= {key: str(earlier[parent].folder / inside) for key, inside in keys.items()}
    values |= _mapping(entry.get("overrides"), f"{where}: `overrides`")
    values |= overrides.get(name, {})
    config = base / entry["config"]
    read_yaml(config)
    accelerate = entry.get("accelerate")
    return Stage(
        name=name,
        command=command,
        config=config,
        folder=root / name,
        sources=sources,
        overrides={**values, "output_dir": str(root / name)},
        accelerate=base / accelerate if accelerate else None,
        models=_models(entry.get("evaluate", command != "distill"), where),
        evaluate_with=_mapping(entry.get("evaluate_with"), f"{where}: `evaluate_with`"),
    )


def _sources(given: Any, where: str, earlier: Mapping[str, Stage]) -> dict[str, dict[str, str]]:
    """`{align: model_name_or_path}`, or `{iterate: {dataset_name: round-4/selection.parquet}}` for what lies inside."""
    sources: dict[str, dict[str, str]] = {}
    for parent, keys in _mapping(given, f"{where}: `from`").items():
        if parent not in earlier:
            raise RecipeError(f"{where}: `from` names `{parent}`, which no earlier stage is{_nearest(parent, earlier)}")
        inside = {keys: "."} if isinstance(keys, str) else _mapping(keys, f"{where}: `from` {parent}")
        if not inside or any(
            ".." in Path(str(path)).parts or Path(str(path)).is_absolute() for path in inside.values()
        ):
            raise RecipeError(f"{where}: `from` {parent} must be a recipe key, or recipe keys with paths inside it")
        sources[parent] = {key: str(path) for key, path in inside.items()}
    return sources


def _models(given: Any, where: str) -> tuple[str, ...]:
    if isinstance(given, bool):
        return (".",) if given else ()
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        return tuple(given)
    raise RecipeError(f"{where}: `evaluate` is true, false, or a list of folders inside the stage, received {given!r}")


def _evaluation(
    content: Mapping[str, Any], path: Path, seed: int | None, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    given = content.get("evaluate")
    if given is None or given is False:
        return None
    values = {} if seed is None else {"seed": seed}
    return {**_mapping(given, f"{path}: `evaluate`"), **values, **overrides.get("evaluate", {})}


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError(f"{where} must be a mapping, received {given!r}")
    return given


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise RecipeError(f"{where}: `{key}` is not a key here; there are {', '.join(known)}{_nearest(key, known)}")


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f". Did you mean `{near[0]}`?" if near else ""


def arguments(values: Mapping[str, Any]) -> list[str]:
    """`--key value ...` as the commands read it."""
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
            words += [f"--{key}", *map(_word, value)]
        else:
            words += [f"--{key}", _word(value)]
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

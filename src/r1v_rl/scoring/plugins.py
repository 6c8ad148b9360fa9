"""Find a reward function of the user's: in a file, or in an installed module. Nothing is put on the import path."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from r1v_rl.errors import RewardError
from r1v_rl.scoring.rules import BUILT_IN, completion_text, gold_column

_PlugIn = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a reward's code came from: a recipe's reward file is code, so it is shown and recorded."""

    path: str
    sha256: str


def find_plugin(name: str) -> tuple[_PlugIn, Source]:
    """The function that `path/file.py:function` or `module.function` names, and its file.

    Raises:
        RewardError: If there is none; with file and line where the file does not import.
    """
    check_name(name)
    path, colon, function_name = name.rpartition(":")
    if colon and path.endswith(".py"):
        module, source = _import_file(Path(path), name)
    else:
        module_name, _, function_name = name.rpartition(".")
        module, source = _import_module(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        near = get_close_matches(function_name, _functions_of(module), n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?"
            if near
            else f"; it has {', '.join(_functions_of(module)) or 'no functions'}"
        )
        raise RewardError(f"reward_funcs: {source.path} has no function {function_name!r} (from {name!r}){hint}")
    if is_compute_score(function):
        function = compute_score_as_reward(
            function, is_sequential=getattr(module, "REWARD_TYPE", "batch") == "sequential"
        )
    return function, source


def check_name(name: str) -> None:
    """Nothing where `name` has the form of a file's or a module's function.

    Raises:
        RewardError: If not.
    """
    if name.endswith(".py"):
        raise RewardError(
            f"reward_funcs: a reward file needs the name of a function, {name}:FUNCTION; received {name!r}"
        )
    is_file = name.rpartition(":")[0].endswith(".py")
    if is_file and not Path(name.rpartition(":")[0]).expanduser().is_file():
        raise RewardError(f"reward_funcs: {name.rpartition(':')[0]} must be a file; it is not there (from {name!r})")
    if not is_file and ("/" in name or "." not in name):
        raise RewardError(_unknown(name))


def is_compute_score(function: _PlugIn) -> bool:
    """Whether a function has EasyR1's signature: its first parameter is named `reward_inputs` or `reward_input`."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return bool(parameters) and parameters[0] in ("reward_inputs", "reward_input")


def compute_score_as_reward(function: _PlugIn, *, is_sequential: bool) -> _PlugIn:
    """EasyR1's `compute_score` in TRL's signature: `overall` is the reward, the other parts are logged by name."""

    def reward(
        completions: Any, completion_ids: Any = None, log_extra: Any = None, log_metric: Any = None, **columns: Any
    ):
        gold = gold_column(columns)
        golds = columns[gold] if gold else [None] * len(completions)
        texts = [completion_text(item) for item in completions]
        lengths = [len(ids) for ids in completion_ids] if completion_ids is not None else [len(text) for text in texts]
        inputs = [
            {"response": text, "response_length": length, "ground_truth": answer}
            for text, length, answer in zip(texts, lengths, golds, strict=True)
        ]
        scores = [function(item) for item in inputs] if is_sequential else function(inputs)
        _check_scores(scores, len(inputs))
        parts = sorted({part for score in scores for part in score if part != "overall"})
        for part in parts:
            values = [score.get(part) for score in scores]
            if log_extra is not None:
                log_extra(part, values)
            numbers = [float(value) for value in values if isinstance(value, int | float)]
            if log_metric is not None and numbers:
                log_metric(f"reward_parts/{part}", sum(numbers) / len(numbers))
        return [score["overall"] for score in scores]

    reward.per_completion = getattr(function, "per_completion", False)  # type: ignore[attr-defined]
    return reward


def _check_scores(scores: Any, num_rows: int) -> None:
    if not isinstance(scores, list) or len(scores) != num_rows:
        received = f"{len(scores)} scores" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(
            f"compute_score must return a list of {num_rows} dicts, one per completion; received {received}"
        )
    for row, score in enumerate(scores):
        if not isinstance(score, dict) or "overall" not in score:
            raise RewardError(f"compute_score must return dicts with the key 'overall'; row {row} is {score!r:.80}")


def _import_file(path: Path, name: str) -> tuple[ModuleType, Source]:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"reward_funcs: {path} must be a file; it is not there (from {name!r})")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    module_name = f"r1v_rl_reward_{path.stem}_{digest[:12]}"
    source = Source(str(path), digest)
    if module_name in sys.modules:
        return sys.modules[module_name], source
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise RewardError(f"reward_funcs: {path} does not import: {where(error, str(path))}") from error
    return module, source


def _import_module(module_name: str, name: str) -> tuple[ModuleType, Source]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise RewardError(_unknown(name)) from error
        raise RewardError(f"reward_funcs: {module_name} does not import: {where(error, '')} (from {name!r})") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward_funcs: {module_name} does not import: {where(error, '')} (from {name!r})") from error
    path = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    return module, Source(path or module_name, digest)


def where(error: BaseException, path: str) -> str:
    """The error in one line, with the last line of `path` (of any file, if empty) that it passed through."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not path or frame.filename == path]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {text}" if frames else text


def _functions_of(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _unknown(name: str) -> str:
    near = get_close_matches(name, BUILT_IN, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"reward_funcs: {name!r} must be one of {', '.join(sorted(BUILT_IN))}, the dotted path of a function in an "
        "installed "
        f"module, or path/file.py:function{hint}; a reward model is the name reward_model with the key reward_model"
    )

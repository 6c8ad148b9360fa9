"""What is secret: variables of the environment, known by their names. A recipe that holds a secret is refused."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r1v_rl.errors import RecipeError

_WORDS = "API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?"
_SECRET_VARIABLE = re.compile(rf"(_|^)({_WORDS})(_?\d+)?$")
_SECRET_KEY = re.compile(
    r"^token$|(^|_)((hub|auth|access|api|hf|bearer)_token|api_?key|(secret|access|private)_key|"
    r"password|passwd|secret|credentials?|authorization)$"
)
"""Not `eos_token` and its like, which are words of a tokenizer."""
_VARIABLE_KEY = re.compile(r"_key_env$")
_USER_AND_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_MIN_LENGTH = 8


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret: `HF_TOKEN`, `WANDB_API_KEY`, `MY_KEY_2`, ..."""
    return _SECRET_VARIABLE.search(variable.upper()) is not None


def secrets() -> dict[str, str]:
    """Value -> name of each environment variable that is named like a secret, longest value first.

    Values of fewer than 8 characters are left out: they would be found in ordinary words.
    """
    found = {value: name for name, value in os.environ.items() if names_secret(name) and len(value) >= _MIN_LENGTH}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def without_secrets(environment: Mapping[str, str], keep: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a process that runs code of others: secrets are left out, but for those named."""
    return {name: value for name, value in environment.items() if name in keep or not names_secret(name)}


def check_holds_no_secret(values: Mapping[str, Any], where: str = "") -> None:
    """A recipe is copied into folders, logs and command lines, so a secret must not stand in it, however deep.

    Args:
        where: What stands before the key in the message, as `FILE: `.

    Raises:
        RecipeError: Naming the key, and never the value.
    """
    known = secrets()
    for path, key, value in _texts(values):
        if _VARIABLE_KEY.search(key):
            if not (re.fullmatch(r"[A-Z_][A-Z0-9_]*", value) and names_secret(value)):
                raise RecipeError(
                    f"{where}`{path}` must be the name of an environment variable, in capitals, that ends in _KEY, "
                    "_TOKEN or _SECRET, whose value is then kept out of everything that is written; what it is set to "
                    "is not shown here, since it may be the key itself"
                )
        elif _is_secret_key(key) and value:
            raise RecipeError(
                f"{where}`{path}` holds a secret, which a recipe and a command line must not: set it in the environment"
                " (HF_TOKEN, WANDB_API_KEY, VLLM_API_KEY, or the variable that a key `..._api_key_env` names)"
            )
        elif _USER_AND_PASSWORD.search(value):
            raise RecipeError(f"{where}`{path}` holds an address with a password: set the key in the environment")
        elif found := next((name for secret, name in known.items() if secret in value), None):
            raise RecipeError(
                f"{where}`{path}` holds the value of the environment variable {found}: leave it there, it is read"
            )


def _is_secret_key(key: str) -> bool:
    return _SECRET_KEY.search(key.lower().replace("-", "_")) is not None


def _texts(value: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """(path of keys, last key, text) of every text in nested values, keys that are texts among them."""
    if isinstance(value, str):
        yield path, key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield path, "", str(name)
            yield from _texts(item, f"{path}.{name}" if path else str(name), str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, path, key)

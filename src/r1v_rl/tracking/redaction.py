"""Keeps secrets out of everything that a run writes or uploads."""

import os
import re
from collections.abc import Mapping
from typing import Any

_SECRET_VARIABLE = re.compile(r"(_|^)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_MIN_SECRET_LENGTH = 8


def redact(value: Any) -> Any:
    """`value` with every secret of the environment, and every user part of a URL, replaced inside its strings.

    A secret is known by its value (`HF_TOKEN`, `WANDB_API_KEY`, ... are set to it), so a key such as
    `num_memory_tokens` keeps its number.
    """
    return _redact(value, secrets())


def secrets() -> dict[str, str]:
    """Value -> name of each environment variable that is named like a secret, longest value first."""
    found = {
        value: name
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name.upper()) and len(value) >= _MIN_SECRET_LENGTH
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _redact(value: Any, known: dict[str, str]) -> Any:
    if isinstance(value, str):
        for secret, name in known.items():
            value = value.replace(secret, f"<{name}>")
        return _USER_IN_URL.sub("<redacted>", value)
    if isinstance(value, Mapping):
        return {_redact(key, known): _redact(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, known) for item in value]
    return value


def printable(text: str) -> str:
    """`text` with all that could steer a terminal (escapes, bidirectional marks, ...) as visible backslash codes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

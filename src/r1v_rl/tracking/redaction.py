"""Keeps secrets out of everything that a run writes or uploads."""

import re
from collections.abc import Mapping
from typing import Any

from r1v_rl.secret_values import secrets

_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redact(value: Any) -> Any:
    """`value` with every secret of the environment, and every user part of a URL, replaced inside its strings.

    A secret is known by its value (`HF_TOKEN`, `WANDB_API_KEY`, ... are set to it), so a key such as
    `num_memory_tokens` keeps its number.
    """
    return _redact(value, secrets())


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

"""Resume on another number of ranks: what must be the same for it, and why a checkpoint is refused."""

import json
import math
from collections.abc import Mapping
from typing import Any

RANKS, ENGINE = "num_processes", "engine"
PER_DEVICE, ACCUMULATION, PER_GENERATION = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
)  # fmt: skip
_ANY_RANKS = (None, "fsdp2")
"""One process or DDP, and FSDP2: what several ranks keep can be put together, and shared out among others."""

Rows = Mapping[str, tuple[str, ...]]


def refusal(then: Mapping[str, Any], now: Mapping[str, Any], rows: Rows) -> str:
    """Why a run cannot go on from a checkpoint, as the end of a sentence about it; empty where it can.

    Args:
        then: Fingerprint of the run that wrote it: keys of the recipe, `num_processes`, `engine`, `data`. A key that an
            earlier version did not write down cannot be compared.
        now: Of this run.
        rows: What must stay as large on another number of ranks, by name, and the keys whose product its size is.
    """
    others = then.get(RANKS) != now[RANKS] and {then.get(ENGINE), now[ENGINE]} <= set(_ANY_RANKS)
    may_differ = {RANKS, ENGINE, PER_DEVICE, ACCUMULATION, PER_GENERATION} if others else set()
    changed = [
        f"{key} was {then.get(key)!r}, is {now[key]!r}"
        for key in now
        if key in then and key not in may_differ and _text(then[key]) != _text(now[key])
    ]
    if changed and then.get(RANKS) != now[RANKS] and then.get(ENGINE) not in _ANY_RANKS:
        return (
            f"was written by {ranks(then)} under {then[ENGINE]}, each with a part of the optimizer's state that only "
            f"as many can go on with, and this run has {now[RANKS]}: launch with `--num_processes {then[RANKS]}`"
        )
    if changed:
        return "belongs to another run, and cannot be continued exactly: " + "; ".join(changed)
    if others and (unequal := [line for name, keys in rows.items() if (line := _unequal(name, keys, then, now))]):
        return (
            f"was written by {ranks(then)} and this run has {now[RANKS]}, which must share the same rows: set these "
            f"keys so that {'; '.join(unequal)}"
        )
    return ""


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def ranks(run: Mapping[str, Any]) -> str:
    """`1 rank`, `2 ranks`: those of a fingerprint."""
    return f"{run[RANKS]} rank{'s' if run[RANKS] > 1 else ''}"


def _unequal(name: str, keys: tuple[str, ...], then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    products = [math.prod(run[key] for key in keys) for run in (then, now)]
    if products[0] == products[1]:
        return ""
    was, is_now = (" x ".join(str(run[key]) for key in keys) for run in (then, now))
    return f"{name}, {' x '.join(keys)}, are {products[0]} as they were ({was}) and not {products[1]} ({is_now})"

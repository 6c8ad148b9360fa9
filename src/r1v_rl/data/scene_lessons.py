"""Worked examples of the task `scenes` for fine-tuning: a question about pictures and a target text that answers it."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from r1v_rl.data.scene_chains import (
    DESCRIBE,
    EXPLAIN,
    boxed,
    brief_completion,
    careful_completion,
    careful_walk,
    description,
    reasoned_completion,
)
from r1v_rl.data.scenes import SceneItem, check_rows, item_row, scene_item, scenes_rows
from r1v_rl.errors import DataError

_TWO_PICTURES_SHARE = 0.3


def _question(item: SceneItem, text: str) -> str:
    """The item's problem with another question."""
    return item.problem.removesuffix(item.question.text) + text


def _explained(item: SceneItem, rng: Random) -> tuple[str, str]:
    walk = careful_walk(item.question, item.scenes)
    return _question(item, f"{item.question.text} {EXPLAIN}"), f"{walk}\n{boxed(item.question.answer)}"


CHAINS: Mapping[str, Callable[[SceneItem, Random], tuple[str, str]]] = {
    "careful": lambda item, rng: (item.problem, careful_completion(item.question, item.scenes)),
    "brief": lambda item, rng: (item.problem, brief_completion(item.question)),
    "mixed": lambda item, rng: (item.problem, reasoned_completion(item.question, item.scenes, rng)),
    "direct": lambda item, rng: (item.problem, boxed(item.question.answer)),
    "explain": _explained,
    "describe": lambda item, rng: (_question(item, DESCRIBE), description(item.scenes)),
}
"""Name -> (problem, completion) of an item.

`careful`, `brief` and `mixed` follow the `<think>` that the reasoning model's prompt opens; `direct`, `explain` and
`describe` are what the substitute model says.
"""


def scene_lesson(
    split: str,
    seed: int,
    index: int,
    chains: Sequence[str] = ("mixed",),
    kinds: Sequence[str] | None = None,
    num_images: int | None = None,
) -> dict[str, Any]:
    """One row of `scenes` with the column `completion`; where several chains are named, one is drawn."""
    rng = Random(f"lesson-{split}-{seed}-{index}")
    if num_images is None:
        num_images = 2 if rng.random() < _TWO_PICTURES_SHARE else 1
    item = scene_item(split, seed, index, kinds=kinds, num_images=num_images)
    chain = chains[0] if len(chains) == 1 else rng.choice(chains)
    problem, completion = CHAINS[chain](item, rng)
    row = item_row(item) | {"problem": problem, "completion": completion, "chain": chain}
    return row | {"answer": None} if chain == "describe" else row


def scene_examples(
    split: str,
    n: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    num_images: int | None = None,
    chains: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The dataset `scenes`: its bare questions, or worked examples where `chains` names their kind.

    Args:
        chains: One or several of `careful brief mixed direct explain describe`; worked examples show one picture or
            two, never a written scene, unless `num_images` says so.
    """
    if chains is None:
        return scenes_rows(split, n, seed, kinds, num_images)
    names = [chains] if isinstance(chains, str) else list(chains)
    if not names or set(names) - set(CHAINS):
        raise DataError(f"scenes has the chains {', '.join(CHAINS)}; received {chains!r} (key: dataset_kwargs)")
    check_rows(split, kinds, num_images)
    return [scene_lesson(split, seed, i, names, kinds, num_images) for i in range(n)]

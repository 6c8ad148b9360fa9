"""Worked examples of the task `scenes` for fine-tuning: a question about pictures and a chain that answers it."""

from random import Random
from typing import Any

from datasets import Dataset

from r1v_rl.data.scene_chains import reasoned_completion
from r1v_rl.data.scenes import IMAGE_MARK, scene_item

_TWO_PICTURES_SHARE = 0.3


def scene_lesson(split: str, seed: int, index: int, careful: bool | None = None) -> dict[str, Any]:
    """Row `messages images completion`; the completion follows the `<think>` that the prompt opens.

    Args:
        careful: True or False for one style of chain, None for the mixture of both.
    """
    rng = Random(f"lesson-{split}-{seed}-{index}")
    num_images = 2 if rng.random() < _TWO_PICTURES_SHARE else 1
    item = scene_item(split, seed, index, num_images=num_images)
    question = item.problem.replace(IMAGE_MARK, "").strip()
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}],
        "images": item.pictures(),
        "completion": reasoned_completion(item.question, item.scenes, rng, careful),
    }


def scene_lessons(split: str, size: int, seed: int, careful: bool | None = None) -> Dataset:
    """`size` lessons as a dataset; a row is made when it is read, so unread rows cost nothing."""

    def rows(batch: dict[str, list]) -> dict[str, list]:
        lessons = [scene_lesson(split, seed, index, careful) for index in batch["index"]]
        return {key: [lesson[key] for lesson in lessons] for key in ("messages", "images", "completion")}

    return Dataset.from_dict({"index": list(range(size))}).with_transform(rows)

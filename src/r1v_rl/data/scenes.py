"""The dataset `scenes`: rows without limit from a seed; train and held-out rows share no scene.

A row's pictures stand where its problem has `<image>`; a text-only row has the scene written out instead, one word per
cell (`a1-red-circle-3`, `a2-empty`) between `<img>` and `</img>`, as a picture's nine visual tokens stand in a prompt.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from PIL import Image

from r1v_rl.data.scene_pictures import draw_scene
from r1v_rl.data.scene_questions import (
    KINDS,
    KINDS_OF_TWO,
    Question,
    Scene,
    positioned_scene,
    sample_question,
    written_scene,
)
from r1v_rl.errors import DataError

SPLITS = ("train", "heldout")
IMAGE_MARK = "<image>"
_KIND_WEIGHTS = {"count": 20, "sum": 30, "difference": 20, "compare": 12, "frequent": 18}
_NUM_IMAGES_WEIGHTS = {1: 60, 2: 25, 0: 15}


@dataclass(frozen=True, slots=True)
class SceneItem:
    """One question with its scenes, before it is written or drawn."""

    id: str
    scenes: tuple[Scene, ...]
    question: Question
    num_images: int
    """As many as scenes, or 0 where the scenes are written out."""

    @property
    def problem(self) -> str:
        marks = [IMAGE_MARK if self.num_images else f"<img> {positioned_scene(s)}</img>" for s in self.scenes]
        return "\n".join([*marks, self.question.text])

    def pictures(self) -> list[Image.Image]:
        """The drawn scenes, the same ones at every call; empty for a text-only row."""
        rng = Random(f"{self.id}-pictures")
        return [draw_scene(scene, rng) for scene in self.scenes] if self.num_images else []


def scene_item(
    split: str, seed: int, index: int, *, kinds: Sequence[str] | None = None, num_images: int | None = None
) -> SceneItem:
    """Row `index` of the endless list that (split, seed, kinds, num_images) name."""
    mix = "".join([f"-{k}" for k in kinds or ()]) + ("" if num_images is None else f"-{num_images}img")
    item_id = f"scenes-{split}{mix}-{seed}-{index}"
    rng = Random(item_id)
    if num_images is None:
        num_images = rng.choices(list(_NUM_IMAGES_WEIGHTS), list(_NUM_IMAGES_WEIGHTS.values()))[0]
    num_scenes = num_images or rng.choices((1, 2), (70, 30))[0]
    allowed = [k for k in kinds or KINDS if k in (KINDS if num_scenes == 1 else KINDS_OF_TWO)]
    if not allowed:
        num_scenes, allowed = 1, list(kinds or KINDS)
        num_images = min(num_images, 1)
    kind = rng.choices(allowed, [_KIND_WEIGHTS[k] for k in allowed])[0]
    scenes, question = sample_question(kind, num_scenes, rng, split=split)
    return SceneItem(item_id, scenes, question, num_images)


def item_row(item: SceneItem) -> dict[str, Any]:
    """The item as a dataset row: `id problem answer images kind template written scene num_objects`; `written`
    is the problem with its scenes written out, as a text-only row has it."""
    return {
        "id": item.id,
        "problem": item.problem,
        "answer": item.question.answer,
        "images": item.pictures(),
        "kind": item.question.kind,
        "template": item.question.template,
        "written": replace(item, num_images=0).problem,
        "scene": " | ".join(written_scene(s) for s in item.scenes),
        "num_objects": sum(thing is not None for s in item.scenes for thing in s),
    }


def scenes_rows(
    split: str, n: int, seed: int, kinds: Sequence[str] | None = None, num_images: int | None = None
) -> list[dict[str, Any]]:
    """The first n rows of a seed: the same ones every time, and a larger n only adds rows.

    Args:
        kinds: Any of `count sum difference compare frequent`; None is all of them.
        num_images: 1, 2, or 0 for written scenes; None is a mix of the three.
    """
    check_rows(split, kinds, num_images)
    return [item_row(scene_item(split, seed, i, kinds=kinds, num_images=num_images)) for i in range(n)]


def check_rows(split: str, kinds: Sequence[str] | None, num_images: int | None) -> None:
    """Refuse a split, a kind or a number of images that `scenes` does not have."""
    if split not in SPLITS:
        raise DataError(f"scenes has the splits {SPLITS}; received {split!r} (key: dataset split)")
    if unknown := set(kinds or ()) - set(KINDS):
        raise DataError(f"scenes has the question kinds {KINDS}; received {sorted(unknown)} (key: kinds)")
    if num_images not in (None, 0, 1, 2):
        raise DataError(f"a row of scenes has 0, 1 or 2 images; received {num_images} (key: num_images)")


def chance_accuracy(rows: Iterable[Mapping[str, Any]]) -> float:
    """Accuracy of whoever knows, for each question template, its most common answer in these rows, and nothing else."""
    answers: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        answers[row["template"]][row["answer"]] += 1
    total = sum(c.total() for c in answers.values())
    return sum(c.most_common(1)[0][1] for c in answers.values()) / total if total else float("nan")

"""Careful walks are right and complete: what they say of each cell, and the tally that they end on."""

import re
from random import Random

from r1v_rl.data.scene_chains import CELL_NAMES, careful_completion, description, look_up, reasoned_completion
from r1v_rl.data.scenes import scene_item


def test_a_walk_names_every_cell_and_ends_on_the_answer():
    for i in range(400):
        item = scene_item("train", 1, i)
        text = careful_completion(item.question, item.scenes)
        walk, box = text.split("</think>\n")
        assert re.findall(r"\b([a-f][123])\b", walk) == list(CELL_NAMES[: 9 * len(item.scenes)])
        assert box == f"\\boxed{{{item.question.answer}}}"
        if item.question.kind in ("count", "sum"):
            assert re.search(r" total \w+ (\d+)$", walk)[1] == item.question.answer
        if item.question.kind == "frequent":
            assert re.search(r" total (\w+) \d+$", walk)[1] == item.question.answer


def test_a_difference_ends_on_two_numbers_with_the_answer_between_them():
    for i in range(200):
        item = scene_item("train", 1, i, kinds=["difference"])
        walk = careful_completion(item.question, item.scenes).split("</think>")[0]
        if len(item.scenes) == 2:
            first, second = map(int, re.findall(r" total \w+ (\d+)", walk))
        else:
            first, second = map(int, re.search(r" total \w+ (\d+) \w+ (\d+)$", walk).groups())
        assert abs(first - second) == int(item.question.answer)


def test_crowded_scenes_get_careful_chains_more_often():
    rng = Random(0)
    looks: dict[int, list[bool]] = {}
    for i in range(2000):
        item = scene_item("train", 2, i, num_images=1)
        count = sum(t is not None for t in item.scenes[0])
        looks.setdefault(count, []).append(reasoned_completion(item.question, item.scenes, rng).startswith("Look"))
    shares = [sum(looks[n]) / len(looks[n]) for n in sorted(looks)]
    assert shares == sorted(shares) and 0.1 < shares[0] < 0.3 and 0.55 < shares[-1] < 0.75


def test_look_ups_and_descriptions_say_what_is_there():
    rng = Random(0)
    for i in range(200):
        item = scene_item("train", 4, i, num_images=0)
        seen = description(item.scenes)
        question, answer = look_up(item.scenes, rng)
        if answer.startswith("Look "):
            assert answer.removeprefix("Look ") in seen
        else:
            digit = answer.removeprefix("\\boxed{").removesuffix("}")
            color, shape = question.rstrip("?").split()[-2:]
            assert f"{color} {shape} {digit}" in seen

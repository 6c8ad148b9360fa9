"""Text lessons for the tiny language models: prompts over written scenes, and the completions they should learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1v_rl.data.scene_chains import (
    DESCRIBE,
    EXPLAIN,
    boxed,
    careful_walk,
    description,
    look_up,
    reasoned_completion,
)
from r1v_rl.data.scene_questions import KINDS, KINDS_OF_TWO, Scene, positioned_scene, sample_question
from r1v_rl.tiny.tokenizer import END

SUBSTITUTE_MIX = {"direct": 10, "explain": 66, "describe": 14, "look_up": 10}
REASONING_MIX = {"think": 100}
CARE_WHEN_CLEAR, CARE_WHEN_FAINT = 0.15, 0.85
"""Share of careful chains over a scene of faintness 0 and 1: what is hard to see gets a closer look."""
_CLEAR_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Lesson:
    task: str
    kind: str
    prompt: str
    completion: str
    answer: str
    faintness: float = 0.0
    """How faint the scene is, 0 to 1: not a word of the prompt, but a part of its cells' vectors."""


def written_prompt(scenes: tuple[Scene, ...], text: str, *, opens_think: bool) -> str:
    """What the chat template makes of a written scene and a question."""
    blocks = [f"<img> {positioned_scene(s)}</img>" for s in scenes]
    user = "\n".join([*blocks, text])
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n" + ("<think>\n" if opens_think else "")


def sample_lesson(task: str, rng: Random, *, split: str, careful: bool | None = None, easy: float = 0.0) -> Lesson:
    """One lesson: `direct`, `explain`, `describe`, `look_up`, or `think` (careful or brief; None: the fainter the
    scene, the more often careful).

    Args:
        easy: Share of lessons over scenes with few objects, where learning starts.
    """
    num_scenes = 1 if rng.random() < 0.7 else 2
    kind = rng.choice(KINDS if num_scenes == 1 else KINDS_OF_TWO)
    num_objects = (2, 3) if rng.random() < easy else None
    scenes, question = sample_question(kind, num_scenes, rng, split=split, num_objects=num_objects)
    text, faintness = question.text, 0.0
    if task == "think":
        if careful is None and split == "train":
            faintness = 0.0 if rng.random() < _CLEAR_SHARE else rng.random()
        if careful is None:
            careful = rng.random() < CARE_WHEN_CLEAR + (CARE_WHEN_FAINT - CARE_WHEN_CLEAR) * faintness
        completion = reasoned_completion(question, scenes, rng, careful)
    elif task == "direct":
        completion = boxed(question.answer)
    elif task == "explain":
        text, completion = f"{text} {EXPLAIN}", f"{careful_walk(question, scenes)}\n{boxed(question.answer)}"
    elif task == "describe":
        text, completion = DESCRIBE, description(scenes)
    else:
        text, completion = look_up(scenes, rng)
    prompt = written_prompt(scenes, text, opens_think=task == "think")
    return Lesson(task, kind, prompt, completion, question.answer, faintness)


def lesson_batches(
    tokenizer: PreTrainedTokenizerFast, mix: dict[str, int], *, seed: int, batch_size: int, easy: float = 0.0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (ids (B, T), loss mask (B, T), faintness (B,)) of training lessons, right-padded.

    Rows of like length stand together, but not where the model chooses between short and long chains: in a batch of
    short ones alone, the first word weighs more than it does in a batch of long ones, and the choice would be skewed.
    """
    rng = Random(f"lessons-{seed}")
    pad = tokenizer.pad_token_id
    while True:
        tasks = rng.choices(list(mix), list(mix.values()), k=batch_size * 16)
        lessons = [sample_lesson(task, rng, split="train", easy=easy) for task in tasks]
        prompts = tokenizer([x.prompt for x in lessons])["input_ids"]
        completions = tokenizer([x.completion + END for x in lessons])["input_ids"]
        rows = list(zip(prompts, completions, [x.faintness for x in lessons], strict=True))
        if "think" not in mix:
            rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(p) + len(c) for p, c, _ in batch)
            ids = torch.full((len(batch), longest), pad)
            mask = torch.zeros(len(batch), longest, dtype=torch.bool)
            for i, (p, c, _) in enumerate(batch):
                ids[i, : len(p) + len(c)] = torch.tensor(p + c)
                mask[i, len(p) : len(p) + len(c)] = True
            yield ids, mask, torch.tensor([faintness for *_, faintness in batch])

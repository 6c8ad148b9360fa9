"""Whether a model looks at the picture: the same questions with grey pictures, with another row's, and with none.

Two gaps, each the mean over rows of (with its picture) - (without), with a paired bootstrap interval:

* accuracy: what the picture is worth to the model's answers.
* log-probability of the gold answer, in nats, where the model must answer at once (an empty think block, then the box).
  The gold answer, and not what the model itself said: that would be likelier with the picture that it was said about
  whatever the model makes of it, and the gap of a model that was never shown a picture would not be 0.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from r1v_rl.data.images import image_hash
from r1v_rl.errors import DataError
from r1v_rl.evaluate.accuracy import accuracy_of, blanked
from r1v_rl.evaluate.interval import Accuracy
from r1v_rl.evaluate.statistics import paired_test
from r1v_rl.rollout.engine import RolloutEngine
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.types import Example

CONTROLS = ("blank", "shuffled", "dropped")


def control_rows(
    examples: Sequence[Example], controls: Sequence[str] = CONTROLS, seed: int = 0
) -> dict[str, list[Example]]:
    """The rows with pictures as they are (`pictures`), and by each control; a control that is possible for none of them
    (one picture in all rows cannot be shuffled) is left out.

    Raises:
        DataError: If fewer than two rows have pictures.
    """
    rows = [example for example in examples if example.images]
    if len(rows) < 2:
        raise DataError(f"grounding needs at least two rows with pictures, the held-out set has {len(rows)}")
    changed = {control: without_picture(rows, control, seed) for control in controls}
    return {"pictures": rows} | {control: found for control, found in changed.items() if found}


def grounding_measures(
    right: Mapping[str, Mapping[str, Sequence[bool]]], logprobs: Mapping[str, Mapping[str, float]], seed: int = 0
) -> dict[str, Any]:
    """`{num_rows, controls: {name: {num_rows, accuracy, accuracy_gap, logprob_gap}}}`; values with their intervals.

    Args:
        right: By set of `control_rows`, row id -> whether each of its answers is right.
        logprobs: By set, row id -> log-probability of the gold answer.
        seed: Of the bootstrap.
    """
    shares = {
        name: {row_id: sum(values) / len(values) for row_id, values in rows.items()} for name, rows in right.items()
    }
    found: dict[str, Any] = {"num_rows": len(logprobs["pictures"]), "controls": {}}
    for name, rows in logprobs.items():
        if name == "pictures":
            continue
        gaps = [
            paired_test([values["pictures"][i] for i in rows], [values[name][i] for i in rows], seed=seed).difference
            for values in (shares, logprobs)
        ]
        found["controls"][name] = {
            "num_rows": len(rows),
            "accuracy": asdict(accuracy_of({i: right[name][i] for i in rows})),
            "accuracy_gap": asdict(gaps[0]),
            "logprob_gap": asdict(gaps[1]),
        }
    return found


def without_picture(examples: Sequence[Example], control: str, seed: int = 0) -> list[Example]:
    """The rows with their pictures `blank` (grey), `shuffled` (those of another row with as many, and other ones; rows
    for which there is none are left out) or `dropped`."""
    if control == "blank":
        return [blanked(example) for example in examples]
    if control == "dropped":
        return [_dropped(example) for example in examples]
    return _shuffled(examples, seed)


def gold_logprobs(engine: RolloutEngine, prompts: Sequence[EncodedPrompt], processor: Any) -> dict[str, float]:
    """Row id -> the log-probability of its gold answer (the box's end included) right after an empty think block
    and the opened box, in nats: the sum over its tokens."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts, starts = [], []
    for prompt in prompts:
        head = ("" if prompt_opens_think(prompt.text) else "<think>\n") + "\n</think>\n\n\\boxed{"
        opened = tokenizer(head, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{head}{prompt.example.answer}}}", add_special_tokens=False)["input_ids"]
        texts.append(ids)
        pairs = zip(opened, ids, strict=False)  # the brace and the answer may be one token
        starts.append(next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(opened), len(ids) - 1)))
    found = engine.token_logprobs(list(prompts), texts)
    return {
        prompt.example.id: sum(logprobs[start:]) for prompt, logprobs, start in zip(prompts, found, starts, strict=True)
    }


def grounding_lines(found: Mapping[str, Any] | None) -> list[str]:
    """The gaps, one line a control."""
    if not found:
        return []
    lines = []
    for name, control in found["controls"].items():
        gap, nats = Accuracy(**control["accuracy_gap"]), Accuracy(**control["logprob_gap"])
        points = f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
        lines.append(f"gap, {name:<11}{points}, {nats.value:+.2f} nats [{nats.low:+.2f}, {nats.high:+.2f}]")
    return lines


def _dropped(example: Example) -> Example:
    messages = [
        {**message, "content": [block for block in message["content"] if block["type"] != "image"]}
        for message in example.messages
    ]
    return replace(example, messages=messages, images=())


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    hashes = {example.id: tuple(map(image_hash, example.images)) for example in examples}
    classes: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        classes[len(example.images)].append(example)
    others: dict[str, Example] = {}
    for _, rows in sorted(classes.items()):
        order = random.Random(seed).sample(rows, len(rows))
        for place, example in enumerate(order):
            following = order[place + 1 :] + order[:place]
            other = next((row for row in following if hashes[row.id] != hashes[example.id]), None)
            if other is not None:
                others[example.id] = other
    return [replace(example, images=others[example.id].images) for example in examples if example.id in others]

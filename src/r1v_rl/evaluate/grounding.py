"""Whether a model looks at the picture: the same questions with grey pictures, with another row's, and with none.

Two gaps, each the mean over rows of (with its picture) - (without), with a paired bootstrap interval:

* accuracy: what the picture is worth to the model's answers.
* log-probability of the gold answer, in nats, where the model must answer at once (an empty think block, then the box).
  The gold answer, and not what the model itself said: that would be likelier with the picture that it was said about
  whatever the model makes of it, and the gap of a model that was never shown a picture would not be 0.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from r1v_rl.data.images import image_hash
from r1v_rl.errors import DataError
from r1v_rl.evaluate.accuracy import Answered, accuracy, blanked
from r1v_rl.evaluate.interval import Accuracy
from r1v_rl.evaluate.statistics import paired_test
from r1v_rl.rollout.engine import RolloutEngine
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.types import Example

CONTROLS = ("blank", "shuffled", "dropped")


def measure_grounding(
    examples: Sequence[Example],
    answered: MutableMapping[str, list[Answered]],
    *,
    answer: Callable[[Sequence[Example]], list[Answered]],
    logprobs: Callable[[Sequence[Example]], list[float]],
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
) -> dict[str, Any]:
    """`{num_rows, controls: {name: {num_rows, accuracy, accuracy_gap, logprob_gap}}}` over the rows with pictures.

    Args:
        answered: Answers by set; `pictures` holds those to the rows as they are. Controls that are not in it are asked
            and added.
        answer: Asks the model.
        logprobs: `gold_logprobs` of these rows.
        seed: Of the shuffle.

    Raises:
        DataError: If fewer than two rows have pictures.
    """
    rows = [example for example in examples if example.images]
    if len(rows) < 2:
        raise DataError(f"grounding needs at least two rows with pictures, the held-out set has {len(rows)}")
    seen, seen_logprobs = _scores(answered["pictures"]), dict(zip(_ids(rows), logprobs(rows), strict=True))
    found: dict[str, Any] = {"num_rows": len(rows), "controls": {}}
    for name in controls:
        changed = without_picture(rows, name, seed)
        if not changed:
            continue  # one picture in all rows cannot be shuffled
        if name not in answered:
            answered[name] = answer(changed)
        unseen, ids = _scores(answered[name]), _ids(changed)
        gap = paired_test([seen[i] for i in ids], [unseen[i] for i in ids], seed=seed).difference
        nats = paired_test([seen_logprobs[i] for i in ids], logprobs(changed), seed=seed).difference
        found["controls"][name] = {
            "num_rows": len(ids),
            "accuracy": asdict(accuracy([row for row in answered[name] if row.example.id in set(ids)])),
            "accuracy_gap": asdict(gap),
            "logprob_gap": asdict(nats),
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


def gold_logprobs(engine: RolloutEngine, prompts: Sequence[EncodedPrompt], processor: Any) -> list[float]:
    """For each prompt the log-probability of its gold answer (the box's end included) right after an empty think block
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
    return [sum(logprobs[start:]) for logprobs, start in zip(found, starts, strict=True)]


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


def _ids(examples: Sequence[Example]) -> list[str]:
    return [example.id for example in examples]


def _scores(answered: Sequence[Answered]) -> dict[str, float]:
    """The share of right answers of each row."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in answered:
        right[row.example.id].append(row.verdict.correct is True)
    return {row_id: sum(values) / len(values) for row_id, values in right.items()}


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

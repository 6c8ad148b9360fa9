"""Accuracy on held-out rows, with its interval, and with the pictures blanked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from r1v_rl.data.images import load_image
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.scoring import Verdict, judge_answers
from r1v_rl.types import Completion, Example

_Z95 = 1.959964
_BLANK = (128, 128, 128)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A share of right answers and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(right: int, total: int) -> Accuracy:
    """Share and Wilson score interval (95 %) of `right` out of `total`; it never leaves [0, 1].

    Raises:
        ValueError: If `total` is 0.
    """
    if total < 1:
        raise ValueError("an accuracy needs at least one row")
    share, z2 = right / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out row with what the model said and what came of it."""

    example: Example
    completion: Completion
    verdict: Verdict


def answer_greedily(
    engine: RolloutEngine, prompts: list[EncodedPrompt], *, max_tokens: int, answer_kind: str, timeout_s: float
) -> list[Answered]:
    """The most likely completion of each prompt, judged against its gold answer."""
    sampling = Sampling(num_generations=1, max_tokens=max_tokens, temperature=0.0)
    completions = [group[0] for group in engine.generate(prompts, sampling, seed=0)]
    golds = [prompt.example.answer for prompt in prompts]
    kinds = [prompt.example.columns.get("answer_kind") or answer_kind for prompt in prompts]
    verdicts = judge_answers([c.text for c in completions], golds, kinds, timeout_s=timeout_s)
    return [
        Answered(prompt.example, completion, verdict)
        for prompt, completion, verdict in zip(prompts, completions, verdicts, strict=True)
    ]


def accuracy(answered: Sequence[Answered]) -> Accuracy:
    """Share of right answers; one that could not be judged is not right."""
    return wilson(sum(row.verdict.correct is True for row in answered), len(answered))


def blanked(example: Example) -> Example:
    """The same row with every picture replaced by an empty grey one of its size: what is left is guessing."""
    images = tuple(Image.new("RGB", load_image(source).size, _BLANK) for source in example.images)
    return replace(example, images=images)

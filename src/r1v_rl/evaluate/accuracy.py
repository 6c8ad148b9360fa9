"""Accuracy on held-out rows, with its interval, and with the pictures blanked."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from r1v_rl.data.images import load_image
from r1v_rl.evaluate.interval import Accuracy, wilson
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.scoring import Verdict, judge_answers
from r1v_rl.scoring.format import prompt_opens_think, with_prompt_think
from r1v_rl.types import Completion, Example

_BLANK = (128, 128, 128)
ACCEPTED = "accepted_answers"
"""Column of a row that has several gold answers of which any is right."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out row with what the model said and what came of it."""

    example: Example
    completion: Completion
    verdict: Verdict
    response: str = ""
    """The completion with the `<think>` that its prompt opened."""
    judged_by: str = "rules"
    """`llm` where a chat model had to read the answer."""


def answer_greedily(
    engine: RolloutEngine, prompts: list[EncodedPrompt], *, max_tokens: int, answer_kind: str, timeout_s: float
) -> list[Answered]:
    """The most likely completion of each prompt, judged against its gold answer."""
    sampling = Sampling(num_generations=1, max_tokens=max_tokens, temperature=0.0)
    return answer_prompts(engine, prompts, sampling, answer_kind=answer_kind, timeout_s=timeout_s)


def answer_prompts(
    engine: RolloutEngine,
    prompts: list[EncodedPrompt],
    sampling: Sampling,
    *,
    answer_kind: str,
    timeout_s: float,
    seed: int = 0,
) -> list[Answered]:
    """The sampled completions of each prompt, those of one prompt side by side, judged against its gold answer."""
    groups = engine.generate(prompts, sampling, seed=seed)
    return judge_completions(prompts, groups, answer_kind=answer_kind, timeout_s=timeout_s)


def judge_completions(
    prompts: Sequence[EncodedPrompt], groups: Sequence[Sequence[Completion]], *, answer_kind: str, timeout_s: float
) -> list[Answered]:
    """The completions of each prompt with their verdicts; of several accepted answers any may be met."""
    rows = [(prompt, completion) for prompt, group in zip(prompts, groups, strict=True) for completion in group]
    responses = [with_prompt_think(completion.text, prompt_opens_think(prompt.text)) for prompt, completion in rows]
    examples = [prompt.example for prompt, _ in rows]
    verdicts = judge_responses(examples, responses, answer_kind=answer_kind, timeout_s=timeout_s)
    return [
        Answered(example, completion, verdict, response)
        for example, (_, completion), verdict, response in zip(examples, rows, verdicts, responses, strict=True)
    ]


def judge_responses(
    examples: Sequence[Example], responses: Sequence[str], *, answer_kind: str, timeout_s: float
) -> list[Verdict]:
    """A verdict on each response to an example; where a row has several accepted answers any may be met."""
    golds = [example.columns.get(ACCEPTED) or [example.answer] for example in examples]
    pairs = [(i, gold) for i, accepted in enumerate(golds) for gold in accepted]
    columns = [examples[i].columns for i, _ in pairs]
    judged = judge_answers(
        [responses[i] for i, _ in pairs],
        [gold for _, gold in pairs],
        [column.get("answer_kind") or answer_kind for column in columns],
        [column.get("choices") for column in columns],
        timeout_s=timeout_s,
    )
    best: dict[int, Verdict] = {}
    for (i, _), verdict in zip(pairs, judged, strict=True):
        if i not in best or (verdict.correct is True and best[i].correct is not True):
            best[i] = verdict
    return [best[i] for i in range(len(examples))]


def accuracy(answered: Sequence[Answered]) -> Accuracy:
    """`accuracy_of` of answers in memory."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in answered:
        right[row.example.id].append(row.verdict.correct is True)
    return accuracy_of(right)


def accuracy_of(right: Mapping[str, Sequence[bool]]) -> Accuracy:
    """Share of right answers, each row counting alike; one that could not be judged is not right.

    Several answers to one row are not independent: the interval is Wilson's for as many independent answers as have
    the variance that the rows' own shares show (one answer a row: the plain interval).

    Args:
        right: Row id -> whether each of its answers is right.
    """
    shares = [sum(values) / len(values) for values in right.values()]
    num_answers = sum(map(len, right.values()))
    total, mean = float(len(shares)), sum(shares) / max(1, len(shares))
    spread = sum((share - mean) ** 2 for share in shares)
    if spread and num_answers > total:
        total = min(float(num_answers), max(total, mean * (1 - mean) * total**2 / spread))
    return wilson(mean * total, total)


def blanked(example: Example) -> Example:
    """The same row with every picture replaced by an empty grey one of its size: what is left is guessing."""
    images = tuple(Image.new("RGB", load_image(source).size, _BLANK) for source in example.images)
    return replace(example, images=images)

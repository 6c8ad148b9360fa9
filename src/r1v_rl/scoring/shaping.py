"""Rewards that shape length, steps and repetition, under open-r1's and TRL's names and with their meaning."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from r1v_rl.errors import RewardError
from r1v_rl.scoring.format import with_prompt_think
from r1v_rl.scoring.rules import Reward, RewardSettings, completion_text, judged

_STEP = re.compile(r"Step \d+:|(?:(?<=\A)|(?<=\n))(?:\d+\.|[-*])|\b(?:First|Second|Next|Finally),")
_WANTED_STEPS = 3
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


def _texts(completions: Sequence[Any], settings: RewardSettings) -> list[str]:
    return [with_prompt_think(completion_text(item), settings.prompt_opens_think) for item in completions]


def tag_count_reward(settings: RewardSettings) -> Reward:
    """open-r1's: a quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>`, on lines of their own, that
    stands there exactly once."""

    def tag_count(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [sum(0.25 for tag in _TAGS if text.count(tag) == 1) for text in _texts(completions, settings)]

    return tag_count


def reasoning_steps_reward(settings: RewardSettings) -> Reward:
    """open-r1's: a third for each marked step (`Step 1:`, `1.`, a bullet, `First,`, ...), at most 1."""

    def reasoning_steps(completions: Sequence[Any], **_: Any) -> list[float | None]:
        counts = [len(_STEP.findall(text)) for text in _texts(completions, settings)]
        return [min(1.0, count / _WANTED_STEPS) for count in counts]

    return reasoning_steps


def cosine_reward(settings: RewardSettings) -> Reward:
    """TRL's: from `cosine_max_value_correct` down to `cosine_min_value_correct` for right answers as they get longer,
    from `cosine_min_value_wrong` up to `cosine_max_value_wrong` for wrong ones, along half a cosine over
    `cosine_max_len` tokens. The judge is that of `accuracy`; None where it is."""

    def cosine(completions: Sequence[Any], completion_ids: Any = None, **columns: Any) -> list[float | None]:
        lengths = _lengths(completions, completion_ids)
        rewards: list[float | None] = []
        for verdict, length in zip(judged(completions, settings, columns, "cosine"), lengths, strict=True):
            if verdict.correct is None:
                rewards.append(None)
                continue
            short, long = (
                (settings.cosine_max_value_correct, settings.cosine_min_value_correct)
                if verdict.correct
                else (settings.cosine_min_value_wrong, settings.cosine_max_value_wrong)
            )
            share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, length / settings.cosine_max_len)))
            rewards.append(long + (short - long) * share)
        return rewards

    return cosine


def length_reward(settings: RewardSettings) -> Reward:
    """open-r1's `length` (Kimi k1.5): 0.5 for the shortest down to -0.5 for the longest completion of a prompt; a wrong
    one gets at most 0. open-r1 compares all completions of a call, this those of one prompt, as the paper has it."""

    def length(
        completions: Sequence[Any], prompts: Any = None, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        lengths = _lengths(completions, completion_ids)
        verdicts = judged(completions, settings, columns, "length")
        ids = columns.get("id")
        groups: dict[str, list[int]] = defaultdict(list)
        for row in range(len(completions)):
            groups[str(ids[row] if ids is not None else prompts[row] if prompts is not None else 0)].append(row)
        rewards: list[float | None] = [None] * len(completions)
        for rows in groups.values():
            shortest, longest = min(lengths[row] for row in rows), max(lengths[row] for row in rows)
            for row in rows:
                value = 0.0 if longest == shortest else 0.5 - (lengths[row] - shortest) / (longest - shortest)
                if verdicts[row].correct is not None:
                    rewards[row] = value if verdicts[row].correct else min(0.0, value)
        return rewards

    return length


def repetition_penalty_reward(settings: RewardSettings) -> Reward:
    """TRL's: `repetition_max_penalty` times the share of repeated n-grams of `repetition_n_grams` tokens."""
    from trl.rewards import get_repetition_penalty_reward

    return _of_tokens(
        get_repetition_penalty_reward(settings.repetition_n_grams, settings.repetition_max_penalty),
        "repetition_penalty",
    )


def soft_overlong_punishment_reward(settings: RewardSettings) -> Reward:
    """TRL's (DAPO): 0 up to `max_completion_len - soft_punish_cache` tokens, then down to -1."""
    from trl.rewards import get_soft_overlong_punishment

    longest = settings.max_completion_len or settings.max_completion_length
    if longest is None:
        raise RewardError(
            "reward soft_overlong_punishment needs `max_completion_len`, the length that is punished whole"
        )
    cache = min(settings.soft_punish_cache, longest)
    return _of_tokens(get_soft_overlong_punishment(longest, cache), "soft_overlong_punishment")


def _of_tokens(function: Callable[..., list[float]], name: str) -> Reward:
    def reward(completions: Sequence[Any], completion_ids: Any = None, **_: Any) -> list[float | None]:
        if completion_ids is None:
            raise RewardError(f"reward {name} counts tokens and needs completion_ids")
        return list(function(completion_ids=completion_ids))

    return reward


def _lengths(completions: Sequence[Any], completion_ids: Any) -> list[int]:
    """In tokens; in characters where there are none, as in rows that were stored without."""
    if completion_ids is not None:
        return [len(ids) for ids in completion_ids]
    return [len(completion_text(item)) for item in completions]

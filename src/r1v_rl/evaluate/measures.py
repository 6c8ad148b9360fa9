"""What a benchmark's answers come to: pass@1 and pass@n, majority vote, intervals, lengths, what could not be read."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from r1v_rl.evaluate.answering import RowSet
from r1v_rl.evaluate.statistics import bootstrap, majority, pass_at
from r1v_rl.scoring.answers import normalised


def benchmark_measures(rows: RowSet, answers: Sequence[dict], seed: int) -> dict[str, Any]:
    """`pass@1` (mean over the samples), `pass@n` and `majority` with intervals over problems, shares and lengths.

    Args:
        answers: As `answering` stores them, those of one row side by side.
    """
    right = right_by_id(answers)
    sampling = rows.sampling
    count = sampling.num_generations
    found: dict[str, Any] = {"num_problems": len(right), "num_samples": count}
    for n in _sizes(count):
        scores = [pass_at(count, sum(values), n) for values in right.values()]
        found[f"pass@{n}"] = asdict(bootstrap(scores, seed=seed))
    if count > 1:
        found["majority"] = asdict(bootstrap(majority_scores(answers), seed=seed))
    total = len(answers)
    return found | {
        "truncated_frac": sum(row["truncated"] for row in answers) / total,
        "unread_frac": sum(row["reason"] in ("no answer", "unparsable") for row in answers) / total,
        "unjudged_frac": sum(row["correct"] is None for row in answers) / total,
        "llm_judged_frac": sum(row["judged_by"] == "llm" for row in answers) / total,
        "mean_tokens": sum(row["num_tokens"] for row in answers) / total,
        "max_tokens": sampling.most_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "groups": _by_group(rows, right),
    }


def right_by_id(answers: Sequence[dict]) -> dict[str, list[bool]]:
    """Row id -> whether each of its answers is right; one that could not be judged is not."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in answers:
        right[row["id"]].append(row["correct"] is True)
    return dict(right)


def majority_scores(answers: Sequence[dict]) -> list[float]:
    """For each row 1 where the answer that most of its samples give is right.

    Samples that are right say the same; others do where their answers read alike.
    """
    by_id: dict[str, list[dict]] = defaultdict(list)
    for row in answers:
        by_id[row["id"]].append(row)
    scores = []
    for samples in by_id.values():
        votes = [_vote(row) for row in samples]
        chosen = majority(votes)
        scores.append(float(chosen is not None and samples[chosen]["correct"] is True))
    return scores


def _vote(row: Mapping[str, Any]) -> tuple[bool, str] | None:
    if row["correct"] is True:
        return True, ""
    return None if row["answer"] is None else (False, normalised(row["answer"]))


def _sizes(count: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    powers = [2**i for i in range(count.bit_length()) if 2**i <= count]
    return sorted({*powers, count})


def _by_group(rows: RowSet, right: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for example in rows.examples:
        if group := example.columns.get("group"):
            groups[group].append(sum(right[example.id]) / len(right[example.id]))
    return {
        name: {"value": sum(scores) / len(scores), "num_problems": len(scores)}
        for name, scores in sorted(groups.items())
    }

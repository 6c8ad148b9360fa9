"""The second half of a round: a chain for every row, its score, and which rows are trained on."""

from collections.abc import Sequence
from typing import Any

from r1v_rl.scoring.format import with_prompt_think
from r1v_rl.scoring.judge_config import WorkedAnswer
from r1v_rl.scoring.judging import read_revision
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.scorer_config import Scorer
from r1v_rl.sft.iterate.answering import needs_chain
from r1v_rl.sft.iterate.config import Recipe
from r1v_rl.sft.iterate.judge import AnswerJudge
from r1v_rl.sft.iterate.selection import JudgedRow
from r1v_rl.types import Example

Record = dict[str, Any]
"""A row's answer as `answering.PART_SCHEMA` lists it."""


def give_chains(
    examples: Sequence[Example],
    records: list[Record],
    recipe: Recipe,
    store: ReplyStore,
) -> None:
    """Add `chain`, `source` and `problem` to each record.

    The model's own finished right chain stays. Another one is replaced by the reviser's, or by a right one of the
    model's further tries; else by the dataset's own; else the row has none, and `problem` says what was tried.
    """
    needy = [i for i, record in enumerate(records) if needs_chain(record)]
    revised = _revise([examples[i] for i in needy], [records[i] for i in needy], recipe, store)
    replacements = dict(zip(needy, revised, strict=True))
    for i, (example, record) in enumerate(zip(examples, records, strict=True)):
        own_chain = example.columns.get("completion")
        if record["correct"] is None:
            chain, source = None, "none"
            problem = record["judge_problem"] or f"gold {str(example.answer)[:40]!r}: {record['verdict']}"
        elif i not in replacements:
            chain, source, problem = record["completion"], "own", ""
        elif (found := replacements[i])[0] is not None:
            chain, source, problem = *found, ""
        elif own_chain:
            chain, source, problem = own_chain, "dataset", found[1]
        else:
            chain, source, problem = None, "none", f"{found[1]}; the dataset has no `completion` for it"
        record |= {"chain": chain, "source": source, "problem": problem}


def give_scores(examples: Sequence[Example], records: list[Record], scorer: Scorer, store: ReplyStore) -> None:
    """Add `score` to each record; what kept the scorer from giving one goes to `problem`."""
    chained = [i for i, record in enumerate(records) if record["chain"] is not None]
    answers = [
        WorkedAnswer(
            examples[i], records[i]["chain"], with_prompt_think(records[i]["chain"], records[i]["opens_think"])
        )
        for i in chained
    ]
    for record in records:
        record["score"] = None
    for i, score in zip(chained, scorer(answers, store) if answers else [], strict=True):
        records[i]["score"] = score.value
        if score.value is None:
            records[i]["problem"] = score.problem


def judged_rows(records: Sequence[Record]) -> list[JudgedRow]:
    """The records as selection reads them."""
    return [JudgedRow(r["id"], r["correct"], r["chain"], r["source"], r["score"], r["problem"] or "") for r in records]


def _revise(
    examples: Sequence[Example],
    records: Sequence[Record],
    recipe: Recipe,
    store: ReplyStore,
) -> list[tuple[str | None, str]]:
    """(chain, its source) for each row that needs one, or (None, what was tried)."""
    scorers, reviser = recipe.scorers, recipe.scorers.reviser()
    if reviser is None:
        return [
            (record["resampled"], "resampled")
            if record["resampled"] is not None
            else (None, f"{record['num_resamples']} further tries were not right")
            for record in records
        ]
    answers = [
        WorkedAnswer(e, r["completion"], with_prompt_think(r["completion"], r["opens_think"]))
        for e, r in zip(examples, records, strict=True)
    ]
    replies = reviser.ask(scorers.questions(scorers.reviser_prompt, answers), store, label="revising")
    chains = [
        None if reply.text is None else read_revision(reply.text, prompt_opens_think=record["opens_think"])
        for reply, record in zip(replies, records, strict=True)
    ]
    judge = AnswerJudge(recipe, store)
    verdicts, _ = judge(examples, [chain or "" for chain in chains], [record["opens_think"] for record in records])
    outcomes: list[tuple[str | None, str]] = []
    for reply, chain, verdict in zip(replies, chains, verdicts, strict=True):
        if chain is not None and verdict.correct is True:
            outcomes.append((chain, "revised"))
        elif reply.text is None:
            outcomes.append((None, f"not revised: {reply.error}"))
        elif chain is None:
            outcomes.append((None, "the revision has no think block with a boxed answer after it"))
        else:
            outcomes.append((None, f"the revision is not right: {verdict.answer!r:.40}"))
    return outcomes

"""Scores of a question and its pictures (QDAM and VTIA): measured, asked of the model, asked of the judge."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from r1v_rl.data.images import load_image
from r1v_rl.distill import prompts
from r1v_rl.distill.clarity import Clarity, clarity, tile_side
from r1v_rl.distill.config import DistillConfig
from r1v_rl.distill.drawing import look
from r1v_rl.distill.generate import Generator, Request
from r1v_rl.distill.integration import integration_by_rules
from r1v_rl.distill.necessity import necessity_by_rules
from r1v_rl.distill.prompts import SubScore
from r1v_rl.distill.records import Chain, Row
from r1v_rl.evaluate.accuracy import blanked
from r1v_rl.models.visual_tokens import VisualTokens
from r1v_rl.scoring.budget import Budget
from r1v_rl.scoring.chat_model import ChatModel, ChatQuestion
from r1v_rl.scoring.judging import fill, question_text
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.types import Example

Judge = Callable[[Sequence[Example], Sequence[Chain]], None]
"""Fills in `correct` of one chain an example."""
_TEXT = ("quality", "difficulty", "reasoning_demand")


def measure(rows: Sequence[Row], processor: Any) -> None:
    """Clarity of each row's least clear picture, and integration by rules; no model is asked."""
    tokens = VisualTokens(processor)
    side = tile_side(processor.image_processor.size)
    for row in rows:
        if not row.example.images:
            continue
        pictures = [load_image(source) for source in row.example.images]
        found: list[Clarity] = [
            clarity(picture, num_tiles=tokens.num_tiles(picture.size), tile_side=side) for picture in pictures
        ]
        worst = min(found, key=lambda one: one.score)
        row.sub_scores["clarity"] = SubScore(round(worst.score, 6), worst.reason)
        by_rules = integration_by_rules(question_text(row.example), len(pictures))
        row.sub_scores["integration_by_rules"] = SubScore(by_rules.score, by_rules.reason)


def ablate(rows: Sequence[Row], generator: Generator, judge: Judge, config: DistillConfig) -> None:
    """Necessity of the pictures: the model answers greedily with them and with grey ones of their size."""
    rows = [row for row in rows if row.example.images]
    greedy = replace(config.sampling(), num_generations=1, temperature=0.0, top_p=1.0, top_k=0)
    found: list[list[Chain]] = []
    for label, change in (("with pictures", None), ("without pictures", blanked)):
        examples = [change(row.example) if change else row.example for row in rows]
        requests = [Request(example, config.max_completion_length) for example in examples]
        groups = generator(requests, greedy, label=label)
        chains = [replace(group[0]) for group in groups]
        judge(examples, chains)
        found.append(chains)
    for row, seeing, blind in zip(rows, *found, strict=True):
        row.sub_scores["necessity_by_ablation"] = necessity(seeing.correct, blind.correct)


def ablate_by_rules(rows: Sequence[Row]) -> None:
    """Necessity of the pictures by what is seen in them of question and answer; no model is asked."""
    for row in rows:
        if row.example.images:
            sights = [look(load_image(source)) for source in row.example.images]
            row.sub_scores["necessity_by_rules"] = necessity_by_rules(
                question_text(row.example), row.example.answer or "", row.example.columns.get("choices"), sights
            )


def necessity(seeing: bool | None, blind: bool | None) -> SubScore:
    """How much an answer depends on the pictures: 0 where it is right without them, 1 where only with them.

    Wrong both ways says nothing: 0.5. None where an answer cannot be judged.
    """
    reason = f"{_word(seeing)} with the pictures, {_word(blind)} without"
    if seeing is None or blind is None:
        return SubScore(None, reason)
    return SubScore(0.0 if blind else (1.0 if seeing else 0.5), reason)


def ask_judge(rows: Sequence[Row], judge: ChatModel, config: DistillConfig, store: ReplyStore, budget: Budget) -> None:
    """Text scores, necessity and integration by the recipe's rubric; a reply that cannot be read is asked for again,
    then the row is unscored."""
    todo = {row.example.id: (row, assessment_question(row.example, config)) for row in rows}
    problems: dict[str, str] = {}
    for number in range(config.num_rereads + 1):
        questions = [question for _, question in todo.values()]
        replies = judge.ask(questions, store, label="assessing", budget=budget) if questions else []
        again = {}
        for (row, question), reply in zip(todo.values(), replies, strict=True):
            read = prompts.read_assessment(reply.text) if reply.text is not None else reply.error
            if isinstance(read, str):
                problems[row.example.id] = read
                if reply.text is not None:  # where none came, `ask` has tried what there is to try
                    base = assessment_question(row.example, config)
                    text = base.text + prompts.AGAIN.format(number=number + 1, problem=read)
                    again[row.example.id] = (row, replace(question, text=text))
                continue
            problems.pop(row.example.id, None)
            _take(row, read)
        todo = again
    for row in rows:
        if problem := problems.get(row.example.id):
            _take(row, {name: SubScore(None, f"unscored: {problem}") for name in prompts.SUB_SCORES})


def assessment_question(example: Example, config: DistillConfig) -> ChatQuestion:
    """What the judge is asked about a row."""
    text = fill(
        config.assess_prompt,
        question=question_text(example),
        answer=example.answer,
        response="",
        columns=example.columns,
    )
    parameters = {"response_format": prompts.assessment_schema()} if config.json_schema else {}
    return ChatQuestion(example.id, text, example.images if config.judge_images else (), parameters)


def combine(rows: Sequence[Row]) -> None:
    """The three scores: means of the sub-scores that there are."""
    for row in rows:
        needed = [row.value(f"necessity_by_{who}") for who in ("ablation", "rules", "judge")]
        row.vision = _mean(row.value("clarity"), _mean(*needed))
        row.text = _mean(*[row.value(name) for name in _TEXT])
        by_judge = row.value("integration_by_judge")
        row.integration = row.value("integration_by_rules") if by_judge is None else by_judge


def _take(row: Row, read: dict[str, SubScore]) -> None:
    for name in _TEXT:
        row.sub_scores[name] = read[name]
    if row.example.images:  # of text alone, the other two mean nothing
        for name in ("necessity", "integration"):
            row.sub_scores[f"{name}_by_judge"] = read[name]


def _mean(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _word(correct: bool | None) -> str:
    return "not judged" if correct is None else "right" if correct else "wrong"

"""What a run would ask and what it would cost, before anything is asked (`dry_run`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1v_rl.distill.assess import assessment_question
from r1v_rl.distill.config import DistillConfig
from r1v_rl.distill.pipeline import Source
from r1v_rl.scoring.budget import Budget
from r1v_rl.scoring.chat_model import ChatModel, ChatQuestion
from r1v_rl.scoring.judging import fill, question_text
from r1v_rl.scoring.replies import ReplyStore, Spent

_BYTES_PER_TOKEN, _IMAGE_TOKENS = 4, 1024
_REPLY_TOKENS = {"assess": 300, "judge answers": 12}


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the estimate."""

    name: str
    model: str
    calls: int
    is_limit: bool
    """Whether it may be fewer: it depends on what the model writes."""
    kept: int
    """Replies that are kept already, and cost nothing."""
    tokens: Spent
    usd: float


def estimate(source: Source, config: DistillConfig, store: ReplyStore) -> list[Step]:
    """The calls of each step; calls of the model in process cost nothing and are listed as such."""
    rows, budget = source.included, Budget(prices=config.prices())
    steps: list[Step] = []
    judge, reviser, generator = config.judge(), config.reviser(), config.generator()
    if config.assessment == "judge" and judge is not None:
        questions = [assessment_question(row.example, config) for row in rows]
        kept = sum(judge.key(question) in store for question in questions)
        missing = [question for question in questions if judge.key(question) not in store]
        steps.append(_step("assess", judge, missing, kept, _REPLY_TOKENS["assess"], budget, is_limit=False))
    pictures = sum(bool(row.example.images) for row in rows)
    answers = (
        2 * pictures if config.ablation and config.necessity_by == "model" else 0
    ) + config.num_generations * len(rows)
    texts = [ChatQuestion(row.example.id, question_text(row.example), row.example.images) for row in rows]
    if generator is None:
        name = str(config.model_name_or_path)
        steps.append(Step("generate", f"{name} (in process)", answers, True, 0, Spent(), 0.0))
    else:
        per_row = -(-answers // max(1, len(rows)))
        steps.append(
            _step("generate", generator, texts * per_row, 0, config.max_completion_length, budget, calls=answers)
        )
    if config.answer_judge == "llm" and judge is not None:
        short = [replace(question, images=()) for question in texts] * config.num_generations
        steps.append(_step("judge answers", judge, short, 0, _REPLY_TOKENS["judge answers"], budget))
    if reviser is not None:
        revisions = [
            ChatQuestion(
                row.example.id,
                fill(
                    config.reviser_prompt,
                    question=question_text(row.example),
                    answer=row.example.answer,
                    response="x" * _BYTES_PER_TOKEN * config.max_completion_length,
                    columns=row.example.columns,
                ),
                row.example.images if config.judge_images else (),
            )
            for row in rows
        ] * config.num_revisions
        steps.append(_step("revise", reviser, revisions, 0, config.max_completion_length, budget))
    return steps


def table(steps: Sequence[Step]) -> str:
    """The estimate as lines of text, with its sum."""
    lines = [("step", "model", "calls", "kept", "tokens in", "tokens out", "dollars")]
    for step in steps:
        most = "<= " if step.is_limit else ""
        tokens = step.tokens
        lines.append(
            (
                step.name,
                step.model,
                f"{most}{step.calls}",
                str(step.kept),
                f"{tokens.input_tokens}",
                f"{tokens.output_tokens}",
                f"{step.usd:.2f}",
            )
        )
    total = sum((step.tokens for step in steps), Spent())
    paid = sum(step.tokens.calls for step in steps)
    lines.append(
        (
            "in all",
            "chat models",
            f"<= {paid}",
            "",
            f"{total.input_tokens}",
            f"{total.output_tokens}",
            f"{sum(step.usd for step in steps):.2f}",
        )
    )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _step(
    name: str,
    model: ChatModel,
    questions: Sequence[ChatQuestion],
    kept: int,
    reply_tokens: int,
    budget: Budget,
    *,
    is_limit: bool = True,
    calls: int | None = None,
) -> Step:
    tokens_in = sum(
        len(question.text.encode()) // _BYTES_PER_TOKEN + _IMAGE_TOKENS * len(question.images) for question in questions
    )
    calls = len(questions) if calls is None else calls
    spent = Spent(calls, tokens_in, reply_tokens * calls)
    return Step(name, model.model, calls, is_limit, kept, spent, budget.dollars(model.model, spent))

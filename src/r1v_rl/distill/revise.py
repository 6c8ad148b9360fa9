"""Which chain a row keeps: the shortest right one of the model's own, else the teacher's revision, else none."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from r1v_rl.data.chat import prompt_text
from r1v_rl.distill import prompts
from r1v_rl.distill.config import Recipe
from r1v_rl.distill.degenerate import degenerate
from r1v_rl.distill.generate import count_tokens
from r1v_rl.distill.records import Chain, Row
from r1v_rl.scoring import judge_answers
from r1v_rl.scoring.budget import Budget
from r1v_rl.scoring.chat_model import ChatQuestion
from r1v_rl.scoring.format import prompt_opens_think, with_prompt_think
from r1v_rl.scoring.judge_config import WorkedAnswer
from r1v_rl.scoring.judging import question_text, read_revision
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.scoring.verifier import MAX_SHOWN_CHARS, SCHEMA, comparison, is_master_key, needs_judge, read_verdict
from r1v_rl.types import Example


class Selection:
    """Judges chains and chooses among them; what it asks goes through one store and one budget."""

    def __init__(self, recipe: Recipe, processor: Any, store: ReplyStore, budget: Budget):
        self._recipe, self._config, self._processor = recipe, recipe.distill, processor
        self._store, self._budget = store, budget
        self._judge = recipe.distill.judge() if recipe.distill.answer_judge == "llm" else None
        self._reviser = recipe.distill.reviser()

    def judge(self, examples: Sequence[Example], chains: Sequence[Chain]) -> None:
        """Fill in whether each chain's answer is right, by the rules, and where these cannot tell by the judge, who
        sees the final answer alone; and what else makes it unfit."""
        opens = [self.opens_think(example) for example in examples]
        kinds = [example.columns.get("answer_kind") or self._config.answer_kind for example in examples]
        verdicts = judge_answers(
            [with_prompt_think(chain.text, opened) for chain, opened in zip(chains, opens, strict=True)],
            [example.answer for example in examples],
            kinds,
            [example.columns.get("choices") for example in examples],
            self._config.reward_timeout_s,
        )
        for example, chain, opened, verdict in zip(examples, chains, opens, verdicts, strict=True):
            chain.correct, chain.answer, chain.verdict = verdict.correct, verdict.answer, verdict.reason
            chain.problem = chain.problem or degenerate(
                chain.text,
                opens_think=opened,
                question=question_text(example),
                max_repeated=self._config.max_repeated,
                is_revision=chain.source == "revised",
            )
        if self._judge is not None:
            doubtful = [i for i, verdict in enumerate(verdicts) if needs_judge(verdict, kinds[i])]
            self._ask_judge([examples[i] for i in doubtful], [chains[i] for i in doubtful])

    def opens_think(self, example: Example) -> bool:
        """Whether the row's prompt ends inside an open `<think>`."""
        return prompt_opens_think(prompt_text(self._processor, example, self._recipe.template_kwargs))

    def choose(self, rows: Sequence[Row]) -> None:
        """Keep the shortest right chain of each row, or have one revised."""
        for row in rows:
            good = [chain for chain in row.own if chain.is_good]
            if good:
                row.kept = min(good, key=lambda chain: chain.num_tokens)
                row.reason = f"the shortest of {len(good)} right chains in {len(row.own)}"
            else:
                row.reason = f"dropped: {_account(row.own)}"
        if self._reviser is not None:
            can_be_judged = [row for row in rows if any(chain.correct is not None for chain in row.own)]
            self._revise([row for row in can_be_judged if row.kept is None])

    def _revise(self, rows: Sequence[Row]) -> None:
        """Up to `num_revisions` times: ask, read, judge again."""
        assert self._reviser is not None
        problems: dict[str, str] = {}
        for number in range(self._config.num_revisions):
            rows = [row for row in rows if row.kept is None]
            questions = [self._revision_question(row, number, problems.get(row.example.id, "")) for row in rows]
            if not questions:
                return
            replies = self._reviser.ask(questions, self._store, label="revising", budget=self._budget)
            revised: list[tuple[Row, Chain]] = []
            for row, reply in zip(rows, replies, strict=True):
                chain = self._read(row, reply.text)
                if chain is not None:
                    revised.append((row, chain))
                    row.chains.append(chain)
                else:
                    why = reply.error or "no think block with a boxed answer after it"
                    problems[row.example.id] = why
                    row.reason = f"dropped: {_account(row.own)}; revision {number + 1}: {why}"
            self.judge([row.example for row, _ in revised], [chain for _, chain in revised])
            for row, chain in revised:
                if chain.is_good:
                    row.kept, row.reason = chain, f"revision {number + 1}; {_account(row.own)}"
                else:
                    problems[row.example.id] = chain.problem or f"its answer {chain.answer!r:.40} is not right"
                    row.reason = f"dropped: {_account(row.own)}; revision {number + 1}: {problems[row.example.id]}"

    def _revision_question(self, row: Row, number: int, problem: str) -> ChatQuestion:
        config, opened = self._config, self.opens_think(row.example)
        base = row.revisions[-1] if row.revisions else _closest(row.own)
        answer = WorkedAnswer(row.example, base.text, with_prompt_think(base.text, opened))
        (question,) = config.questions(config.reviser_prompt, [answer])
        if number:
            question = replace(
                question, text=question.text + prompts.REVISE_AGAIN.format(number=number, problem=problem)
            )
        return question

    def _read(self, row: Row, reply: str | None) -> Chain | None:
        text = None if reply is None else read_revision(reply, prompt_opens_think=self.opens_think(row.example))
        if text is None:
            return None
        return Chain(text, count_tokens(self._processor, text), is_truncated=False, source="revised")

    def _ask_judge(self, examples: Sequence[Example], chains: Sequence[Chain]) -> None:
        """Compare final answers; what cannot be read after a few tries stays as the rules have it."""
        assert self._judge is not None
        todo: dict[int, ChatQuestion] = {}
        for i, (example, chain) in enumerate(zip(examples, chains, strict=True)):
            answer = str(chain.answer)
            if len(answer) >= MAX_SHOWN_CHARS or is_master_key(answer):
                chain.correct, chain.verdict = False, "wrong"
                continue
            parameters = {"response_format": SCHEMA} if self._config.json_schema else {}
            text = comparison(example.messages, example.answer, answer)
            todo[i] = ChatQuestion(example.id, text, parameters=parameters)
        asked = dict(todo)
        for number in range(self._config.num_rereads + 1):
            questions = list(todo.values())
            replies = self._judge.ask(questions, self._store, label="judging", budget=self._budget) if todo else []
            again = {}
            for i, reply in zip(todo, replies, strict=True):
                same = None if reply.text is None else read_verdict(reply.text)
                if same is not None:
                    chains[i].correct, chains[i].verdict = same, f"{'right' if same else 'wrong'} (judge)"
                elif reply.text is not None:
                    problem = prompts.AGAIN.format(number=number + 1, problem="it is not the wanted JSON object")
                    again[i] = replace(asked[i], text=asked[i].text + problem)
                else:
                    chains[i].correct, chains[i].verdict = None, f"not judged: {reply.error}"
            todo = again
        for i in todo:
            chains[i].correct, chains[i].verdict = None, "not judged: no reply could be read"


def _closest(chains: Sequence[Chain]) -> Chain:
    """What the teacher starts from: a right chain that is unfit, else the shortest finished one, else the first."""
    right = [chain for chain in chains if chain.correct]
    finished = [chain for chain in chains if not chain.is_truncated]
    return min(right or finished or chains[:1], key=lambda chain: chain.num_tokens)


def _account(chains: Sequence[Chain]) -> str:
    """What became of a row's own chains, in words."""
    counts: Counter[str] = Counter()
    for chain in chains:
        if chain.is_truncated:
            counts["cut off"] += 1
        elif chain.correct is None:
            counts[f"not judged ({chain.verdict})"] += 1
        elif not chain.correct:
            counts["wrong"] += 1
        else:
            counts[f"right, but {chain.problem}"] += 1
    return f"of {len(chains)} chains " + ", ".join(f"{number} {what}" for what, number in counts.items())

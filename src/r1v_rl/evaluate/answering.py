"""Sets of rows -> every answer with its verdict, chunk by chunk into a file that only grows; what is in it stays."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from r1v_rl.evaluate.accuracy import Answered, judge_completions
from r1v_rl.evaluate.answer_file import AnswerFile
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt, prompt_encoder
from r1v_rl.types import Completion, Example

Judge = Callable[[Sequence[Answered]], list[Answered]]


@dataclass(frozen=True)
class RowSet:
    """Rows that are asked and measured together."""

    name: str
    examples: Sequence[Example]
    sampling: Sampling
    change: Callable[[Example], Example] | None = None
    """What is done to a row before it is asked."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How rows are asked and judged."""

    processor: Any
    answer_kind: str
    timeout_s: float
    seed: int
    chunk_size: int
    """Rows at once: what a killed run loses at most, twice."""
    with_vision_inputs: bool
    """Whether the engine takes processed pictures (transformers) or makes its own (vLLM)."""
    judge: Judge | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows of one set that are answered together: the unit that is stored whole or not at all."""

    rows: RowSet
    start: int
    stop: int

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """(set, row id, sample) of every answer, in order."""
        examples = [self.rows.examples[i] for i in range(self.start, self.stop)]
        return [
            (self.rows.name, e.id, sample) for e in examples for sample in range(self.rows.sampling.num_generations)
        ]


def chunks_of(sets: Sequence[RowSet], size: int) -> list[Chunk]:
    """The rows of every set, `size` at a time."""
    return [
        Chunk(rows, start, min(start + size, len(rows.examples)))
        for rows in sets
        for start in range(0, len(rows.examples), size)
    ]


def answer_sets(
    sets: Sequence[RowSet], asking: Asking, answers: AnswerFile, start_engine: Callable[[], Any]
) -> dict[str, float]:
    """Answer and judge what `answers` does not hold yet; returns `seconds` of the engine and `tokens` that it wrote.

    While the engine writes, the next chunk's pictures are read and the last one's answers judged.

    Args:
        start_engine: Context manager of the engine; not called where nothing is missing.
    """
    chunks = chunks_of(sets, asking.chunk_size)
    done = answers.take_over(chunk.keys for chunk in chunks)
    spent = {"seconds": 0.0, "tokens": 0.0}
    if done == len(chunks):
        return spent
    total = sum(chunk.stop - chunk.start for chunk in chunks)
    with ExitStack() as stack:
        engine = stack.enter_context(start_engine())
        ahead, behind = (stack.enter_context(_worker()) for _ in range(2))
        finished = sum(chunk.stop - chunk.start for chunk in chunks[:done])
        bar = stack.enter_context(tqdm(total=total, initial=finished, desc="answering", disable=None, unit="row"))
        processor = copy.deepcopy(asking.processor)  # used in another thread
        encode = prompt_encoder(processor, device="cpu", with_vision_inputs=asking.with_vision_inputs)
        encoded = ahead.submit(_encoded, encode, chunks[done])
        judged: Future | None = None
        for number in range(done, len(chunks)):
            prompts = encoded.result()
            if number + 1 < len(chunks):
                encoded = ahead.submit(_encoded, encode, chunks[number + 1])
            groups = _generate(engine, chunks[number], prompts, asking.seed, spent)
            if judged is not None:
                judged.result()
            judged = behind.submit(_keep, asking, chunks[number], prompts, groups, answers, bar)
        assert judged is not None
        judged.result()
    return spent


def _generate(
    engine: RolloutEngine, chunk: Chunk, prompts: list[EncodedPrompt], seed: int, spent: dict[str, float]
) -> list[list[Completion]]:
    started = time.perf_counter()
    groups = engine.generate(prompts, chunk.rows.sampling, seed=seed + chunk.start)
    spent["seconds"] += time.perf_counter() - started
    spent["tokens"] += sum(len(completion.token_ids) for group in groups for completion in group)
    return groups


def _encoded(encode: Callable[[Example], EncodedPrompt], chunk: Chunk) -> list[EncodedPrompt]:
    examples = [chunk.rows.examples[i] for i in range(chunk.start, chunk.stop)]
    change = chunk.rows.change
    return [encode(change(example) if change else example) for example in examples]


def _keep(
    asking: Asking,
    chunk: Chunk,
    prompts: list[EncodedPrompt],
    groups: list[list[Completion]],
    answers: AnswerFile,
    bar: tqdm,
) -> None:
    answered = judge_completions(prompts, groups, answer_kind=asking.answer_kind, timeout_s=asking.timeout_s)
    if asking.judge is not None:
        answered = asking.judge(answered)
    samples = [sample for group in groups for sample in range(len(group))]
    answers.append([_answer_row(chunk.rows.name, *pair) for pair in zip(answered, samples, strict=True)])
    bar.update(chunk.stop - chunk.start)


def _answer_row(name: str, row: Answered, sample: int) -> dict[str, Any]:
    return {
        "set": name,
        "id": row.example.id,
        "sample": sample,
        "completion": row.completion.text,
        "num_tokens": len(row.completion.token_ids),
        "truncated": row.completion.is_truncated,
        "answer": row.verdict.answer,
        "gold": row.example.answer,
        "correct": row.verdict.correct,
        "reason": row.verdict.reason,
        "judged_by": row.judged_by,
    }


@contextmanager
def _worker() -> Iterator[ThreadPoolExecutor]:
    """One thread, whose waiting work is dropped where the run fails."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)

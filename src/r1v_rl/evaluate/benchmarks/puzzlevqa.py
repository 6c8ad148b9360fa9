"""PuzzleVQA: abstract patterns with one part missing, three or four options (arXiv:2403.13315)."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    choices = [str(choice) for choice in first(row, "choices", "options")]
    image = first(row, "images", "image")
    return Question(
        id=str(first(row, "id", default=position)),
        text=first(row, "problem", "question"),
        answer=chr(ord("A") + choices.index(str(row["answer"]))),
        kind="choice",
        choices=choices,
        images=list(image) if isinstance(image, list | tuple) else [image],
        group=str(row.get("category") or ""),
    )


BENCHMARKS = [Benchmark("puzzlevqa", "PuzzleVQA", read, 2000, files=("dev.jsonl", "data/*.json"))]

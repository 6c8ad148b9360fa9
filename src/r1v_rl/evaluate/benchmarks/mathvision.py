"""MATH-Vision: 3040 problems of mathematics competitions, each with a picture (arXiv:2402.14804)."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    choices = list(first(row, "options", "choices", default=()))
    images = first(row, "decoded_image", "images", "image", default=[])
    return Question(
        id=str(row.get("id", position)),
        text=first(row, "question", "problem"),
        answer=str(row["answer"]),
        kind="choice" if choices else "math",
        choices=choices,
        images=list(images) if isinstance(images, list | tuple) else [images],
        group=str(row.get("subject") or ""),
    )


BENCHMARKS = [
    Benchmark(
        "mathvision", "MATH-Vision", read, 3040, "MathLLMs/MathVision",
        files=("test.jsonl", "data/test-*.parquet", "dev.jsonl"), folders=("MathVision", "MATH-V"),
    )
]  # fmt: skip

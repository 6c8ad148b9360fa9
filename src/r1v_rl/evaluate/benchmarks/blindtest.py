"""BlindTest: lines that cross, circles and squares to count, grids to measure (arXiv:2407.06581)."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    answer = str(first(row, "answer", "groundtruth"))
    image = first(row, "images", "image")
    return Question(
        id=str(row.get("id", position)),
        text=first(row, "problem", "prompt"),
        answer=answer,
        kind="number" if answer.lstrip("-").isdigit() else "math",
        images=list(image) if isinstance(image, list | tuple) else [image],
        group=str(row.get("task") or ""),
    )


BENCHMARKS = [Benchmark("blindtest", "BlindTest", read, 8000, "XAI/vlmsareblind", split="valid", files=("dev.jsonl",))]

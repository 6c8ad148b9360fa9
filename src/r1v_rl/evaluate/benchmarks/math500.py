"""MATH-500: the 500 test problems of MATH that PRM800K kept apart (arXiv:2305.20050)."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    row_id = first(row, "unique_id", "id", default=position)
    return Question(str(row_id), first(row, "problem"), str(row["answer"]), "math", group=str(row.get("subject") or ""))


BENCHMARKS = [Benchmark("math500", "MATH-500", read, 500, "HuggingFaceH4/MATH-500", files=("test.jsonl", "dev.jsonl"))]

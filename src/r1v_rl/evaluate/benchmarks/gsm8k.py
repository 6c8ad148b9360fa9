"""GSM8K: 1319 test problems whose worked answer ends in `#### number` (arXiv:2110.14168)."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    answer = str(row["answer"]).rpartition("####")[2].strip()
    return Question(str(row.get("id", position)), first(row, "question", "problem"), answer, "math")


BENCHMARKS = [
    Benchmark(
        "gsm8k", "GSM8K", read, 1319, "openai/gsm8k", configs=("main",), files=("dev.jsonl", "main/test-*.parquet")
    )
]

"""The science and engineering subjects of MMLU (arXiv:2009.03300): four options, text only."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question


def read(row, position):
    answer = row["answer"] if isinstance(row["answer"], str) else "ABCD"[row["answer"]]
    text = row.get("problem") or row["question"]
    return Question(
        str(row.get("id", position)), text, answer, "choice", row["choices"], group=row.get("subject") or ""
    )


BENCHMARKS = [Benchmark("mmlu_stem", "MMLU STEM", read, 3018, files=("test.jsonl", "dev.jsonl"))]

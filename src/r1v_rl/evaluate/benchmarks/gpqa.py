"""GPQA-Diamond: 198 questions with one right and three wrong answers (arXiv:2311.12022), in an order drawn by id.

Its authors ask that no question be shown in plain text: it is on the hub behind an agreement, and the results page
leaves its questions out.
"""

from random import Random

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question

_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def read(row, position):
    row_id = str(row.get("Record ID") or position)
    order = Random(row_id).sample(range(4), 4)
    options = [str(row[_OPTIONS[i]]).strip() for i in order]
    answer = chr(ord("A") + order.index(0))
    subject = str(row.get("High-level domain") or "")
    return Question(row_id, str(row["Question"]).strip(), answer, "choice", options, group=subject)


BENCHMARKS = [
    Benchmark(
        "gpqa_diamond", "GPQA-Diamond", read, 198, "Idavidrein/gpqa", split="train", configs=("gpqa_diamond",),
        files=("gpqa_diamond.csv",), folders=("gpqa",), is_private=True,
    )
]  # fmt: skip

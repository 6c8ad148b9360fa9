"""NLVR's pictures of coloured shapes in three boxes (Suhr et al., ACL 2017): counting, and statements about them."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question


def read(row, position):
    choices = row.get("choices") or ()
    return Question(
        id=str(row["id"]),
        text=row["problem"],
        answer=str(row["answer"]),
        kind="choice" if choices else "number",
        choices=choices,
        images=row["images"],
    )


BENCHMARKS = [
    Benchmark("nlvr_counting", "NLVR counting", read, 989, files=("counting_dev.jsonl",), folders=("nlvr",)),
    Benchmark("nlvr", "NLVR statements", read, 989, files=("dev.jsonl",)),
]

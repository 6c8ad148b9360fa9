"""MathVista testmini: 1000 questions about pictures, with options or a number of a given precision (2310.02255)."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    choices = list(row.get("choices") or ())
    has_options = row.get("question_type") == "multi_choice" and bool(choices)
    images = first(row, "decoded_image", "image", "images", default=[])
    metadata = row.get("metadata") or {}
    return Question(
        id=str(first(row, "pid", "id", default=position)),
        text=first(row, "question", "problem"),
        answer=chr(ord("A") + choices.index(row["answer"])) if has_options else str(row["answer"]),
        kind="choice" if has_options else "math",
        choices=choices if has_options else (),
        images=list(images) if isinstance(images, list | tuple) else [images],
        hint="" if has_options else _hint(row),
        group=str(metadata.get("task") or ""),
    )


def _hint(row):
    parts = []
    if row.get("answer_type") == "float" and row.get("precision") is not None:
        parts.append(f"Give a number rounded to {int(float(row['precision']))} decimal place(s).")
    if row.get("answer_type") == "integer":
        parts.append("Give a whole number.")
    if row.get("answer_type") == "list":
        parts.append("Give a list, such as [1, 2].")
    if row.get("unit"):
        parts.append(f"Unit: {row['unit']}.")
    return " ".join(parts)


BENCHMARKS = [
    Benchmark(
        "mathvista", "MathVista (testmini)", read, 1000, "AI4Math/MathVista", split="testmini",
        files=("testmini.jsonl", "data/testmini-*.parquet", "dev.jsonl"), folders=("mathvista_testmini_text",),
    )
]  # fmt: skip

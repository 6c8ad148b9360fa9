"""MMMU validation: 900 questions of 30 college subjects with up to seven pictures in text and options (2311.16502)."""

import ast

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question

SUBJECTS = (
    "Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory", "Basic_Medical_Science",
    "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design",
    "Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics", "Energy_and_Power", "Finance", "Geography",
    "History", "Literature", "Manage", "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music",
    "Pharmacy", "Physics", "Psychology", "Public_Health", "Sociology",
)  # fmt: skip


def read(row, position):
    """`options`, and an open question with several right answers, are Python lists written as text."""
    options = [str(option) for option in _as_list(row.get("options"))]
    answers = [str(answer) for answer in _as_list(row["answer"])]
    has_options = row.get("question_type") == "multiple-choice" and bool(options)
    numbered = [row.get(f"image_{number}") for number in range(1, 8)]
    last = max((number for number, image in enumerate(numbered, start=1) if image is not None), default=0)
    return Question(
        id=str(row["id"]),
        text=row["question"],
        answer=answers[0],
        kind="choice" if has_options else "math",
        choices=options if has_options else (),
        images=numbered[:last],
        group=str(row["id"]).removeprefix("validation_").rpartition("_")[0],
        answers=answers,
    )


def _as_list(value):
    if isinstance(value, str):
        value = ast.literal_eval(value) if value.startswith("[") else [value]
    return list(value or ())


BENCHMARKS = [Benchmark("mmmu", "MMMU (val)", read, 900, "MMMU/MMMU", split="validation", configs=SUBJECTS)]

"""Folders as the hub publishes the benchmarks, made from a few real rows (benchmark_rows.jsonl, licences in it)."""

import csv
import io
import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from random_vlm import picture

ASSETS = Path(__file__).parent / "assets"
ROWS: dict[str, list[dict]] = defaultdict(list)
for line in (ASSETS / "benchmark_rows.jsonl").read_text().splitlines():
    entry = json.loads(line)
    ROWS[entry["set"]].append(entry["row"])


def encoded(seed: int) -> dict:
    """A picture as `datasets` stores it in parquet."""
    buffer = io.BytesIO()
    picture(seed, 40, 30).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_all(root: Path) -> Path:
    """Every benchmark but `scenes`, each in its published layout."""
    math = [{**r, "unique_id": r["id"].removeprefix("math500/")} for r in ROWS["math500"]]
    jsonl(root / "MATH-500" / "test.jsonl", [{k: v for k, v in r.items() if k not in ("id", "images")} for r in math])
    aime = [
        {"id": 60 + i, "problem": r["problem"], "answer": r["answer"], "year": "2024"}
        for i, r in enumerate(ROWS["aime2024"])
    ]
    parquet(root / "aime_2024" / "data" / "train-00000-of-00001.parquet", aime)
    gsm8k = [{"question": r["problem"], "answer": f"6 * 3 = <<6*3=18>>18\n#### {r['answer']}"} for r in ROWS["gsm8k"]]
    parquet(root / "gsm8k" / "main" / "test-00000-of-00001.parquet", gsm8k)
    jsonl(root / "mmlu_stem" / "dev.jsonl", ROWS["mmlu_stem"])
    _gpqa(root / "gpqa")
    _mathvista(root / "MathVista")
    vision = [
        {
            "id": r["id"].removeprefix("mathvision/"), "question": r["problem"], "options": r["choices"] or [],
            "image": f"images/{i}.jpg", "decoded_image": encoded(i), "answer": r["answer"], "subject": r["subject"],
        }
        for i, r in enumerate(ROWS["mathvision"])
    ]  # fmt: skip
    parquet(root / "MathVision" / "data" / "test-00000-of-00001-3532b8d3f1b4047a.parquet", vision)
    _mmmu(root / "MMMU")
    for name in ("puzzlevqa", "blindtest"):
        jsonl(root / name / "dev.jsonl", ROWS[name])
        for number, row in enumerate(ROWS[name]):
            (root / name / row["images"][0]).parent.mkdir(parents=True, exist_ok=True)
            picture(number, 50, 40).save(root / name / row["images"][0])
    (root / "nlvr").symlink_to(ASSETS / "nlvr")
    return root


def _gpqa(folder: Path) -> None:
    """Invented rows: the real ones must not be shown."""
    folder.mkdir()
    with open(folder / "gpqa_diamond.csv", "w", newline="") as file:
        writer = csv.DictWriter(
            file,
            ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)), "Record ID",
             "High-level domain"],
        )  # fmt: skip
        writer.writeheader()
        for number in range(6):
            wrong = {f"Incorrect Answer {i}": f"{number + 10 * i} m" for i in (1, 2, 3)}
            writer.writerow(
                {"Question": f"How long is rod {number},\nin metres?", "Correct Answer": f"{number} m\n", **wrong,
                 "Record ID": f"rec{number}", "High-level domain": "Physics"}
            )  # fmt: skip


def _mathvista(folder: Path) -> None:
    rows = [
        {
            "pid": r["id"].removeprefix("mathvista/"), "question": r["problem"], "image": r["image_name"],
            "decoded_image": encoded(10 + i), "choices": r["choices"], "unit": r["unit"],
            "precision": None if r["precision"] is None else float(r["precision"]), "answer": r["answer"],
            "question_type": r["question_type"], "answer_type": r["answer_type"],
            "metadata": {"task": r["metadata"]["task"]}, "query": "unused",
        }
        for i, r in enumerate(ROWS["mathvista_testmini_text"])
    ]  # fmt: skip
    parquet(folder / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", rows)


def _mmmu(folder: Path) -> None:
    """Real answers and options; the questions are stand-ins. The second row has two pictures, one in an option."""
    for number, row in enumerate(ROWS["mmmu"]):
        subject = row["item"].removeprefix("validation_").rpartition("_")[0]
        options = list((row["index2ans"] or {}).values())
        question, second = "What does <image 1> show?", None
        if number == 1:
            question, second = "Which of these follows on <image 2>?", encoded(90)
            options[0] = "<image 1>"
        answer = row["answer"]
        parquet(
            folder / subject / "validation-00000-of-00001.parquet",
            [
                {
                    "id": row["item"], "question": question, "options": repr(options),
                    "answer": repr(answer) if isinstance(answer, list) else answer,
                    "question_type": "multiple-choice" if options else "open", "image_1": encoded(20 + number),
                    "image_2": second, "image_3": None, "explanation": "", "topic_difficulty": "Easy",
                }
            ],
        )  # fmt: skip

"""AIME: the 30 problems of one year; every answer is a whole number from 0 to 999."""

from r1v_rl.evaluate.benchmarks.base import Benchmark, Question, first


def read(row, position):
    answer = str(first(row, "answer", "Answer"))
    return Question(str(first(row, "id", "ID", default=position)), first(row, "problem", "Problem"), answer, "math")


BENCHMARKS = [
    Benchmark("aime2024", "AIME 2024", read, 30, "HuggingFaceH4/aime_2024", split="train", files=("dev.jsonl",)),
    Benchmark("aime2025", "AIME 2025", read, 30, "MathArena/aime_2025", split="train", files=("dev.jsonl",)),
]

"""Scores that Skywork R1V's report prints (arXiv:2504.05599, tables 1 and 2), to be laid beside our own.

Its protocol: pass@1 over five runs, up to 64k tokens, answers judged by a script with a language model that was not
published. Numbers from other prompts, graders and decimal places differ by points.
"""

from collections.abc import Mapping

R1V: Mapping[str, Mapping[str, float]] = {
    "Skywork R1V 38B": {"math500": 94.0, "aime2024": 72.0, "gpqa_diamond": 61.6, "mathvista": 67.5, "mmmu": 69.0},
    "QwQ-32B-Preview": {"math500": 90.6, "aime2024": 50.0, "gpqa_diamond": 54.5},
    "InternVL2.5-38B": {"mathvista": 71.9, "mmmu": 63.9},
    "Qwen2.5-VL-72B": {"mathvista": 74.8, "mmmu": 70.2},
    "Claude 3.5 Sonnet": {"math500": 78.3, "aime2024": 16.0, "gpqa_diamond": 65.0, "mathvista": 65.3, "mmmu": 66.4},
    "GPT-4o": {"math500": 74.6, "aime2024": 9.3, "gpqa_diamond": 49.9, "mathvista": 63.8, "mmmu": 69.1},
}
PUBLISHED: Mapping[str, Mapping[str, Mapping[str, float]]] = {"r1v": R1V}
"""What `compare` may name -> model -> benchmark -> per cent."""

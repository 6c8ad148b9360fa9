"""Benchmarks by name: where each one is published, and how a row of it becomes a question with a gold answer."""

from collections.abc import Mapping

from r1v_rl.evaluate.benchmarks import (
    aime,
    blindtest,
    gpqa,
    gsm8k,
    math500,
    mathvision,
    mathvista,
    mmlu_stem,
    mmmu,
    nlvr,
    puzzlevqa,
    scenes,
)
from r1v_rl.evaluate.benchmarks.base import Benchmark

_MODULES = (math500, aime, gpqa, gsm8k, mmlu_stem, mathvista, mmmu, mathvision, nlvr, puzzlevqa, blindtest, scenes)
BENCHMARKS: Mapping[str, Benchmark] = {b.name: b for module in _MODULES for b in module.BENCHMARKS}
"""Name -> benchmark; a new one is a file beside this with a list `BENCHMARKS`."""

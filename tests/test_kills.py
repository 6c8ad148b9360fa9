"""SIGKILL at random times: every launch goes on, and the weights are those of the undisturbed run, to the last bit.

`R1V_LONG=1 pytest tests/test_kills.py -s` kills each stage 20 times on one and on two ranks; `R1V_SEED` says when.
"""

import os

import pytest
from kill_run import RECIPES, kill_at_random
from random_vlm import save_random_vlm

LONG = bool(os.environ.get("R1V_LONG"))
KILLS = 20 if LONG else 2
SEED = int(os.environ.get("R1V_SEED", "0"))
CASES = [
    (stage, ranks) for stage in RECIPES for ranks in (1, 2) if LONG or (stage, ranks) in (("align", 1), ("grpo", 2))
]


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_killed_at_random_times(tmp_path, stage, ranks):
    model = save_random_vlm(tmp_path / "model", max_tiles=1)
    seen = kill_at_random(stage, ranks, model, tmp_path, kills=KILLS, seed=SEED)
    print(
        f"\n| {stage} | {ranks} | {seen.kills} killed | {seen.resumed} launches resumed | {seen.identical} of "
        f"{seen.finished} runs bit-identical | ended within {seen.slowest_end_s:.1f} s of a kill |"
    )
    assert seen.kills == KILLS and seen.finished >= 1
    assert seen.identical == seen.finished

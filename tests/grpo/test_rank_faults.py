"""One of two ranks is killed, stopped, fails or makes NaN: both end soon, and what is left says which and why."""

import os
import signal

import pytest
from grpo.engine_run import ENGINES
from grpo.fault_run import faulty_run, run_on_two_ranks
from random_vlm import save_random_vlm

from r1v_rl import checkpoints

LIMIT_S, PATIENCE_S = 15, 120
LONG = bool(os.environ.get("R1V_LONG"))
PLACE = {"ddp": "forward", "fsdp2": "reward", "zero2": "save", "zero3": "forward"}
KINDS = ("kill", "stop", "raise", "nan")
FEW = {("ddp", "stop"), ("ddp", "nan"), ("fsdp2", "kill"), ("zero2", "stop"), ("zero3", "raise")}
CASES = [(engine, kind) for engine in ENGINES for kind in KINDS if (engine, kind) in FEW or LONG]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_a_lost_rank_ends_the_other_with_a_message(model, tmp_path, engine, kind):
    place = "forward" if kind == "nan" else PLACE[engine]
    ended = faulty_run(engine, model, tmp_path, kind, place, PATIENCE_S)
    print(f"{engine}, {kind} in {place}: all ended after {ended.seconds:.1f} s, exit codes {ended.codes}")
    survivor, struck = ended.said
    if kind == "nan":
        assert ended.codes == [2, 2], ended.said
        assert all("the gradient of step 3 has norm nan" in said for said in ended.said), ended.said
    else:
        assert ended.codes == [1, 1 if kind == "raise" else -signal.SIGKILL], ended.said
        wanted = {"kill": "was killed", "stop": "was stopped (SIGSTOP) for more than 2 s", "raise": "planted"}[kind]
        last = survivor.strip().splitlines()[-1]
        assert "rank 1 (process " in last and wanted in last and "`--resume_from_checkpoint true` goes on" in last
        assert "Traceback" not in survivor and ("RuntimeError: planted" in struck) == (kind == "raise")
    assert checkpoints.latest_complete(tmp_path / "run") == tmp_path / "run/checkpoint-2"
    assert not ended.left, "a process stays behind"
    assert ended.seconds < LIMIT_S


@pytest.mark.parametrize("engine", ENGINES if LONG else ["ddp"])
def test_killed_inside_a_save_of_two_ranks(model, tmp_path, engine):
    """One rank, at a write of its own: of the first at three, of the second at one; with R1V_LONG at every one."""
    assert run_on_two_ranks(engine, model, tmp_path / "whole") == [0, 0]
    wanted = (tmp_path / "whole" / "final-0.txt").read_text()
    writes = {0: range(100) if LONG else (2, 12, 24), 1: range(100) if LONG else (1,)}
    for rank, numbers in writes.items():
        kills = 0
        for nth in numbers:
            folder = tmp_path / f"{rank}-{nth}"
            kill = {"rank": rank, "step": 2, "moment": "inside save", "nth": nth}
            codes = run_on_two_ranks(engine, model, folder, kill)
            if codes == [0, 0]:
                break  # it opens fewer files than that in all of the run
            assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, codes
            kills += 1
            assert run_on_two_ranks(engine, model, folder) == [0, 0]
            assert (folder / "final-0.txt").read_text() == wanted, f"rank {rank} killed at write {nth} of the save"
        print(f"{engine}: rank {rank} killed at {kills} writes, resumed to the same bits each time")
        assert kills == len(numbers) or (LONG and kills > 1)

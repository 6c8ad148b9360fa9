"""What the ranks of a run do when one is lost: two bare processes, and the launcher's store in this one."""

import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed
from torch.distributed import TCPStore

from r1v_rl.errors import RankError, UserError
from r1v_rl.training.ranks import watched_ranks

WAYS = {
    "killed": (-signal.SIGKILL, "was killed, by a signal or by the kernel for want of memory (`dmesg`)"),
    "stopped": (-signal.SIGKILL, "was stopped (SIGSTOP) for more than 1 s (`rank_timeout_s`), and is killed"),
    "failed": (1, "failed: RuntimeError: out of luck"),
    "mistaken": (2, "failed: UserError: a key is wrong"),
    "gone at once": (3, "was killed"),
}


@pytest.mark.parametrize("survivor", ["in a collective", "busy"])
@pytest.mark.parametrize("way", WAYS)
def test_the_other_rank_ends_and_says_which_was_lost_and_how(tmp_path, way, survivor):
    (tmp_path / "checkpoint-7").mkdir()
    ended_after, codes, said = run(tmp_path, way, survivor)
    code, wanted = WAYS[way]
    assert codes == [1, code], said
    (line,) = [line for line in said[0].splitlines() if "Rank 0 ends with it" in line]
    assert f"rank 1 (process {pid_of(tmp_path, 1)} on " in line and wanted in line, line
    assert "`--resume_from_checkpoint true` goes on from checkpoint-7" in line
    assert ended_after < 15


def test_ranks_that_are_done_end_each_in_their_own_time(tmp_path):
    """A short stop is nothing, and who has left the block may be gone while another works on in it."""
    _, codes, said = run(tmp_path, "stopped for a moment", "busy for four seconds")
    assert codes == [0, 0], said


def run(folder: Path, way: str, survivor: str) -> tuple[float, list[int | None], list[str]]:
    """Seconds that rank 0 lived on, exit codes, and what was said."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=child, args=(rank, store.port, folder, way, survivor)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    while not (folder / "struck").exists() and ranks[1].is_alive():
        time.sleep(0.02)
    if way == "stopped for a moment":
        time.sleep(0.6)
        os.kill(ranks[1].pid, signal.SIGCONT)
    started = time.monotonic()
    for rank in ranks:
        rank.join(120)
    seconds = time.monotonic() - started
    for rank in ranks:
        rank.kill()
    return seconds, [rank.exitcode for rank in ranks], [(folder / f"{n}.log").read_text() for n in (0, 1)]


def pid_of(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.pid").read_text()


def child(rank: int, port: int, folder: Path, way: str, survivor: str) -> None:
    sys.stdout = sys.stderr = open(folder / f"{rank}.log", "w", buffering=1)  # noqa: SIM115
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.distributed.init_process_group("gloo")
    try:
        with watched_ranks(SimpleNamespace(rank_timeout_s=1.0, output_dir=str(folder))):
            with watched_ranks(None):  # one inside of another is nothing
                torch.distributed.barrier()
            if rank == 1:
                (folder / "struck").touch()
                struck(way)
            elif survivor == "in a collective":
                torch.distributed.barrier()
            else:
                time.sleep(4 if survivor == "busy for four seconds" else 60)
    except RankError as error:
        print(f"r1v-rl: error: {error}")
        os._exit(1)
    except UserError:
        os._exit(2)
    except RuntimeError:
        os._exit(1)
    os._exit(0)


def struck(way: str) -> None:
    if way == "gone at once":
        os._exit(3)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way.startswith("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "failed":
        raise RuntimeError("out of luck")
    if way == "mistaken":
        raise UserError("a key is wrong")

"""A rank that something happens to, in a block that is watched, without a trainer. Imports torch alone."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch.distributed
from torch.distributed import TCPStore

from r1v_rl.errors import RankError, UserError
from r1v_rl.training.ranks import watched_ranks


def a_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def child(rank: int, port: int, folder: Path, way: str, survivor: str) -> None:
    sys.stdout = sys.stderr = open(folder / f"{rank}.log", "w", buffering=1)  # noqa: SIM115
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    join(rank, port)
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
    except RankError:
        os._exit(1)
    except UserError:
        os._exit(2)
    except RuntimeError:
        os._exit(1)
    os._exit(0)


def join(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.distributed.init_process_group("gloo")


def struck(way: str) -> None:
    if way == "nothing":
        time.sleep(60)
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


if __name__ == "__main__":
    child(int(os.environ["RANK"]), int(os.environ["MASTER_PORT"]), Path(sys.argv[1]), "stopped", "in a collective")

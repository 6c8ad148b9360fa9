"""The ranks of a run as processes that a test can watch and kill, forked from one that has everything imported."""

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from grpo.engine_run import launch_environment, use_gloo_alone
from torch.distributed import TCPStore

_MARK = "R1V_TEST_RUN"


@dataclass
class Ranks:
    """Of one launch. The launcher's store is in the test's process, as it is in the launcher's otherwise."""

    processes: list[Any]
    logs: list[Path]
    mark: str
    store: TCPStore | None

    def wait(self, limit_s: float, *, ranks: list[int] | None = None) -> list[int | None]:
        """The exit codes after so long at most; None for a rank that still runs."""
        deadline = time.monotonic() + limit_s
        chosen = [self.processes[rank] for rank in ranks] if ranks is not None else self.processes
        for process in chosen:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def left(self) -> list[int]:
        """Processes that this launch left running, ranks and whatever they started."""
        wanted, found = f"{_MARK}={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes() and b") Z " not in (folder / "stat").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def launch(engine: str | None, folder: Path, function: Callable[..., int | None], *arguments: Any) -> Ranks:
    """Start `function(*arguments)` on two ranks under an engine, or on one (None), with their output in `folder`."""
    context = multiprocessing.get_context("forkserver")
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # the server looks for what it preloads there
    context.set_forkserver_preload(["ranks", "r1v_rl.grpo.main", "r1v_rl.sft.main"])
    mark = uuid.uuid4().hex
    environment, store = {_MARK: mark}, None
    if engine is not None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))
        environment |= launch_environment(engine)
        environment |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [0] if engine is None else [0, 1]
    logs = [folder / f"rank-{rank}.log" for rank in numbers]
    processes = []
    for rank, log in zip(numbers, logs, strict=True):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} if engine is not None else {}
        process = context.Process(target=_rank, args=(engine, {**environment, **own}, log, function, arguments))
        process.start()
        processes.append(process)
    return Ranks(processes, logs, mark, store)


def _rank(engine: str | None, environment: dict[str, str], log: Path, function: Callable, arguments: tuple) -> None:
    os.environ |= environment
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if engine is not None and engine.startswith("zero"):
        use_gloo_alone()
    raise SystemExit(function(*arguments))

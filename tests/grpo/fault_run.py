"""GRPO runs of a random tiny model on two ranks, one of which something happens to."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.engine_run import make_trainer
from killer import Killer
from ranks import launch

from r1v_rl import cli

PLACES = {"forward": "compute_loss", "reward": "reward_stage.judge", "save": "_write_checkpoint"}
_RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "rank_timeout_s": 2.0, "recorded": False}
_started_with: tuple = ()


@dataclass
class Ended:
    """What became of the two ranks."""

    codes: list[int | None]
    seconds: float
    """From the fault to the end of the last one."""
    said: list[str]
    left: list[int]


def faulty_run(engine: str, model: Path, folder: Path, kind: str, place: str, limit_s: float) -> Ended:
    """Launch both ranks; in its third call of `place` rank 1 is struck by `kind`: kill, stop, raise, nan."""
    ranks, struck = launch(engine, folder, _command, engine, model, folder, kind, place), folder / "struck"
    deadline = time.monotonic() + 240
    while not struck.exists() and time.monotonic() < deadline and None in ranks.wait(0):
        time.sleep(0.05)
    started = time.monotonic()
    codes = ranks.wait(limit_s)
    ended = Ended(codes, time.monotonic() - started, ranks.said(), ranks.left())
    ranks.end()
    assert struck.exists(), ended
    return ended


def run_on_two_ranks(engine: str, model: Path, folder: Path, kill: dict | None = None) -> list[int | None]:
    """Exit codes of a run, resumed where there are checkpoints; `kill` is the killer's arguments and its `rank`."""
    ranks = launch(engine, folder, _train, engine, model, folder, kill)
    codes = ranks.wait(240)
    assert None not in codes, ranks.said()
    assert not ranks.left()
    return codes


def _train(engine: str, model: Path, folder: Path, kill: dict | None) -> None:
    trainer = make_trainer(engine, model, folder, _RUN)
    if kill and int(os.environ["RANK"]) == kill["rank"]:
        trainer.add_callback(Killer(**{key: value for key, value in kill.items() if key != "rank"}))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    (folder / f"final-{os.environ['RANK']}.txt").write_text(trainer._weight_hash())


def _command(*arguments: Any) -> int:
    """As from the command line, where an error becomes a message and an exit code."""
    global _started_with
    _started_with = arguments
    cli.COMMANDS["faulty"] = cli.Command("grpo.fault_run:command", "")
    return cli.main(["faulty"])


def command(argv: list[str]) -> None:
    engine, model, folder, kind, place = _started_with
    trainer = make_trainer(engine, model, folder / "run", _RUN)
    if os.environ["RANK"] == "1":
        _plant(trainer, kind, PLACES[place], folder / "struck")
    trainer.train()


def _plant(trainer: Any, kind: str, place: str, struck: Path) -> None:
    part, _, method = place.rpartition(".")
    owner = getattr(trainer, part) if part else trainer
    calls, real = 0, getattr(owner, method)

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 3:
            return real(*args, **kwargs)
        struck.touch()
        if kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        elif kind == "raise":
            raise RuntimeError("planted")
        return real(*args, **kwargs) * float("nan")

    setattr(owner, method, planted)

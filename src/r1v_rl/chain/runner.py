"""Runs a chain: each stage that is not done, each model that is not measured, in child processes."""

import fcntl
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from r1v_rl.chain.inputs import changed_inputs, read_manifest, stage_inputs
from r1v_rl.chain.process import Children
from r1v_rl.chain.recipe import Chain, Stage, arguments
from r1v_rl.chain.table import StageRow, StageTable, compare_parts
from r1v_rl.checkpoints import checkpoint_folders
from r1v_rl.durable import replacing, set_aside
from r1v_rl.errors import CheckpointError
from r1v_rl.evaluate.record import read_evaluation
from r1v_rl.scoring.replies import REPLIES

_LOCK_WAIT_S = 60.0
"""A killed run's children take a moment to go, on GPUs a long one."""


class StageFailed(Exception):
    """A child process ended with another exit code than 0."""

    def __init__(self, what: str, code: int):
        super().__init__(f"{what} ended with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Plan:
    """What a run would do with one stage."""

    stage: Stage
    action: str
    """`skip`, `run`, `resume` or `replace`."""
    reason: str

    def __str__(self) -> str:
        return f"{self.stage.name}: {self.reason}"


class Runner:
    """One run of a chain."""

    def __init__(self, chain: Chain):
        self.chain = chain
        self.table = StageTable.read(chain.output_dir)
        self.order = [stage.name for stage in chain.stages]

    def plan(self, stage: Stage) -> Plan:
        """Whether the stage is done with these very inputs; where it is not, what happens to its folder."""
        row = self.table.rows.get(stage.name)
        if not stage.folder.exists() or not any(stage.folder.iterdir()):
            return Plan(stage, "run", "not done yet")
        if row is None:
            return Plan(stage, "replace", f"{stage.folder} was not made by this chain")
        if changed := changed_inputs(row.inputs, stage_inputs(stage, self.chain)):
            return Plan(stage, "replace", f"changed since it was made: {', '.join(changed)}")
        if read_manifest(stage.folder) is not None:
            return Plan(stage, "skip", "done, inputs unchanged")
        return Plan(stage, "resume", "begun, not complete")

    def plans(self, stages: Sequence[Stage]) -> list[Plan]:
        """What a run would do with each: a stage whose parent runs is not up to date."""
        plans: dict[str, Plan] = {}
        for stage in stages:
            plan = self.plan(stage)
            runs = [name for name in stage.sources if plans[name].action != "skip"]
            if runs and plan.action == "skip":
                plan = Plan(stage, "replace", f"starts from {' and '.join(runs)}")
            plans[stage.name] = plan
        return list(plans.values())

    def run(self, stages: Sequence[Stage]) -> int:
        """Exit code 0, or 128 + N after signal N, with the table printed.

        Raises:
            StageFailed: Naming the stage whose command failed.
        """
        with locked(self.chain.output_dir) as lock, Children() as children:
            for number, stage in enumerate(stages, start=1):
                plan = self.plan(stage)
                self._say(f"[{number}/{len(stages)}] {plan}")
                if plan.action != "skip":
                    self._run_stage(plan, children, lock)
                if children.received is None:
                    measured = self._measure(stage, children, lock)
                    if number < len(stages) and (plan.action != "skip" or measured):
                        print(self.table.markdown(self.order), flush=True)
                if children.received is not None:
                    self._say(f"stopped by {signal.Signals(children.received).name} at {stage.name}; the same command "
                              f"goes on from there")  # fmt: skip
                    return 128 + children.received
            self.table.write(self.order)
        print(f"\n{self.table.markdown(self.order)}\n{self.chain.output_dir}/stages.md", flush=True)
        return 0

    def command(self, stage: Stage, *, resume: bool = False) -> list[str]:
        """The command line of a stage."""
        keys = {**stage.overrides, **({"resume_from_checkpoint": True} if resume else {})}
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(stage.accelerate)]
        launch = launcher if stage.accelerate else []
        return [sys.executable, *launch, "-m", "r1v_rl", stage.command, "--config", str(stage.config), *arguments(keys)]

    def _run_stage(self, plan: Plan, children: Children, lock: int) -> None:
        stage = plan.stage
        if plan.action == "replace":
            self._say(f"  the old folder is kept as {_set_aside(stage.folder)}")
        if plan.action != "resume":
            self.table.rows[stage.name] = StageRow(stage_inputs(stage, self.chain))
            self.table.write(self.order)  # before it starts: a killed run must know what its folder was made from
        row = self.table.rows[stage.name]
        command = self.command(stage, resume=bool(checkpoint_folders(stage.folder)))
        self._say(f"  {shlex.join(command)}")
        code = self._child(command, row, children, lock)
        if children.received is None and (code or read_manifest(stage.folder) is None):
            raise StageFailed(f"stage `{stage.name}` ({stage.command})", code or 1)
        row.parts = self._compare(stage)
        self.table.write(self.order)

    def _child(self, command: list[str], row: StageRow, children: Children, lock: int) -> int:
        """Run it, its seconds added to the row as they pass: a kill does not lose them."""
        before, started = row.seconds, time.monotonic()

        def tick() -> None:
            row.seconds = round(before + time.monotonic() - started, 1)
            self.table.write(self.order)

        code = children.run(command, keep_open=lock, on_tick=tick)
        tick()
        return code

    def _measure(self, stage: Stage, children: Children, lock: int) -> bool:
        """Evaluate the stage's models that have no evaluation by these keys yet; whether there was one."""
        row, measured = self.table.rows[stage.name], False
        row.parts = self._compare(stage)
        row.evaluations = {}
        for inside in models_of(stage) if self.chain.evaluate is not None else ():
            folder, values = stage.folder / inside, {**(self.chain.evaluate or {}), **stage.evaluate_with}
            found = read_evaluation(folder, values)
            if found is None:
                words = arguments({**values, "model_name_or_path": str(folder)})
                command = [sys.executable, "-m", "r1v_rl", "evaluate", *words]
                self._say(f"  {shlex.join(command)}")
                code = children.run(command, keep_open=lock)
                if children.received is not None:
                    return measured
                found = read_evaluation(folder, values) if code == 0 else None
                if found is None:
                    raise StageFailed(f"the evaluation of {folder}", code or 1)
                measured = True
            row.evaluations[inside] = {
                key: value for key, value in found.items() if key not in ("settings", "files", "versions")
            }
            self.table.write(self.order)
        return measured

    def _compare(self, stage: Stage) -> dict[str, str]:
        """The stage's parts against those of its first parent."""
        manifest = read_manifest(stage.folder)
        if manifest is None:
            return {}
        parent = next((read_manifest(self.chain.stage(name).folder) for name in stage.sources), None)
        return compare_parts(manifest.get("weight_hashes") or {}, (parent or {}).get("weight_hashes"))

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)


def models_of(stage: Stage) -> list[str]:
    """The folders inside a complete stage that are measured, in the order of their numbers; the result comes last.

    A round that left the same weights as the stage itself is not measured twice.
    """
    found: list[str] = []
    for pattern in filter(lambda name: name != ".", stage.models):
        folders = [path for path in stage.folder.glob(pattern) if read_manifest(path) is not None]
        folders.sort(key=lambda path: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", str(path))])
        found += [str(path.relative_to(stage.folder)) for path in folders]
    if "." not in stage.models:
        return found
    result = (read_manifest(stage.folder) or {}).get("weight_hashes")
    different = [
        inside for inside in found if (read_manifest(stage.folder / inside) or {}).get("weight_hashes") != result
    ]
    return [*different, "."]


@contextmanager
def locked(output_dir: Path) -> Iterator[int]:
    """Descriptor of the chain's lock: one run at a time, a child that an earlier one left included.

    Raises:
        CheckpointError: If it is still held after a minute.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline, told = time.monotonic() + _LOCK_WAIT_S, False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{output_dir} is in use by another run of its chain; wait for it, stop it, or name another "
                        f"`--output_dir`"
                    ) from None
                if not told:
                    print(f"waiting for another run in {output_dir}, or what is left of it, to end", flush=True)
                    told = True
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> Path:
    """Make room for another recipe's folder; what judges were asked is there for the new one too."""
    aside = set_aside(folder)
    if (aside / REPLIES).is_file():
        folder.mkdir()
        with replacing(folder / REPLIES) as copied:
            shutil.copyfile(aside / REPLIES, copied)
    return aside

"""What the ranks of a run do when one is lost: two bare processes, and the launcher's store in this one."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed
from training.bare_rank import a_store, child, join

from r1v_rl.runtime import end_with_starter, is_running
from r1v_rl.training.signals import StopOnSignal

CLEAN = multiprocessing.get_context("forkserver")
"""Of a process that has torch, and not of this one: vLLM in another test may have joined it to a group."""

CLEAN.set_forkserver_preload(["r1v_rl.training.ranks", "r1v_rl.training.signals"])

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
    assert codes == [0, 0] and said == ["", ""]


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    store = a_store()
    launcher = CLEAN.Process(target=launch, args=(store.port, tmp_path))
    launcher.start()
    wait_until(lambda: (tmp_path / "struck").exists())
    launcher.kill()
    pids = [int(pid_of(tmp_path, rank)) for rank in (0, 1)]
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids)) < 15
    assert all("the launcher was killed. Rank" in (tmp_path / f"{rank}.log").read_text() for rank in (0, 1))


def test_a_rank_that_still_imports_ends_with_its_launcher(tmp_path):
    """It would wait for the launcher's store, up to `ddp_timeout`."""
    start = f"import subprocess; subprocess.run({[sys.executable, '-m', 'r1v_rl', 'grpo', '--help']!r})"
    launcher = subprocess.Popen([sys.executable, "-c", start], env={**os.environ, "TORCHELASTIC_RUN_ID": "none"})
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    wait_until(lambda: children.read_text() != "")
    rank = Path("/proc") / children.read_text().strip()
    wait_until(lambda: b"libtorch" in (rank / "maps").read_bytes())
    launcher.kill()
    launcher.wait()
    assert wait_until(lambda: not is_running(int(rank.name))) < 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_one_rank_hears_stops_all_after_the_same_step(tmp_path, number):
    store = a_store()
    ranks = [CLEAN.Process(target=steps, args=(rank, store.port, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    wait_until(lambda: (tmp_path / "struck").exists())
    os.kill(ranks[1].pid, number)
    for rank in ranks:
        rank.join(60)
        rank.kill()
    ended = [(tmp_path / f"{rank}.ended").read_text() for rank in (0, 1)]
    assert ended[0] == ended[1] and ended[0].startswith(f"{int(number)} after step ")


def test_accelerate_launch_ends_soon_after_a_rank_is_stopped(tmp_path):
    """Not after torchrun's 30 s for a process that heeds no signal; nothing stays, the port is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(Path(__file__).with_name("bare_rank.py")), str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        wait_until(lambda: (tmp_path / "struck").exists() or run.poll() is not None)
        started = time.monotonic()
        output, _ = run.communicate(timeout=120)
        seconds = time.monotonic() - started
    assert run.returncode == 1, output
    said = (tmp_path / "0.log").read_text()
    assert f"rank 1 (process {pid_of(tmp_path, 1)} on " in said and "was stopped (SIGSTOP)" in said
    assert "exitcode  : -9" in output or "Signal 9 (SIGKILL)" in output, output
    assert not any(Path(f"/proc/{pid_of(tmp_path, rank)}").exists() for rank in (0, 1))
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    assert seconds < 15


def wait_until(condition: Callable[[], bool]) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 400
        time.sleep(0.02)
    return time.monotonic() - started


def launch(port: int, folder: Path) -> None:
    for rank in (0, 1):
        if os.fork() == 0:
            os.environ["TORCHELASTIC_RUN_ID"] = "none"
            end_with_starter()  # as `python -m r1v_rl` does: once they watch each other they still say why they end
            child(rank, port, folder, "nothing", "busy")
    signal.pause()


def steps(rank: int, port: int, folder: Path) -> None:
    """A training loop as far as signals go."""
    join(rank, port)
    stop, control, step = StopOnSignal(), SimpleNamespace(should_save=False, should_training_stop=False), 0
    stop.on_train_begin(None, None, control)
    while not control.should_training_stop:
        time.sleep(0.05)
        step += 1
        stop.on_step_end(SimpleNamespace(device="cpu"), None, control)
        if step == 3:
            (folder / "struck").touch()
    assert control.should_save
    (folder / f"{rank}.ended").write_text(f"{stop.received} after step {step}")
    torch.distributed.barrier()
    os._exit(0)


def run(folder: Path, way: str, survivor: str) -> tuple[float, list[int | None], list[str]]:
    """Seconds that rank 0 lived on, exit codes, and what was said."""
    store = a_store()
    ranks = [CLEAN.Process(target=child, args=(rank, store.port, folder, way, survivor)) for rank in (0, 1)]
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

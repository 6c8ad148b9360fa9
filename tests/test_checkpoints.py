"""A checkpoint folder is complete or absent, whatever kills the save; what comes back is bit by bit what was saved."""

import json
import logging
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from r1v_rl import checkpoints
from r1v_rl.durable import replace_file, write_file
from r1v_rl.errors import CheckpointError
from r1v_rl.state_files import save_state, save_tensors


def fill(folder: Path, seed: int) -> None:
    """What a trainer leaves: weights, nested state, JSON, a file in a folder below."""
    generator = torch.Generator().manual_seed(seed)
    save_tensors(folder / "model.safetensors", {"w": torch.randn(64, 64, generator=generator)})
    save_state(folder / "optimizer", {"state": {0: torch.randn(64, generator=generator)}, "lr": 0.1 * seed})
    (folder / "reference").mkdir()
    save_tensors(folder / "reference" / "model.safetensors", {"w": torch.randn(8, generator=generator)})
    write_file(folder / "trainer_state.json", json.dumps({"global_step": seed}).encode())


def save(output_dir: Path, step: int) -> Path:
    path = output_dir / f"checkpoint-{step}"
    with checkpoints.writing(path, meta={"step": step}) as temporary:
        fill(temporary, step)
    return path


def run_in_child(work) -> int:
    """The status with which a forked process ended `work`; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_save_is_complete_and_readable(tmp_path):
    path = save(tmp_path, 12)
    assert checkpoints.verify(path) == []
    assert checkpoints.latest_complete(tmp_path) == path
    assert checkpoints.read_meta(path) == {"step": 12}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-12"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"]["reference/model.safetensors"] == {
        "size": (path / "reference/model.safetensors").stat().st_size,
        "sha256": checkpoints.file_sha256(path / "reference/model.safetensors"),
    }


def test_meta_may_grow_inside_the_block(tmp_path):
    meta = {"step": 1}
    with checkpoints.writing(tmp_path / "checkpoint-1", meta=meta) as temporary:
        write_file(temporary / "a.json", b"{}")
        meta["weights"] = "abc"
    assert checkpoints.read_meta(tmp_path / "checkpoint-1") == {"step": 1, "weights": "abc"}


def test_the_folder_being_written_is_invisible_to_transformers(tmp_path):
    save(tmp_path, 1)
    with checkpoints.writing(tmp_path / "checkpoint-2") as temporary:
        fill(temporary, 2)
        assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
        assert list(tmp_path.glob("checkpoint-*")) == [tmp_path / "checkpoint-1"]
        assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-1"


def test_an_exception_inside_the_block_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="planted"), checkpoints.writing(tmp_path / "checkpoint-2") as temporary:
        fill(temporary, 2)
        raise RuntimeError("planted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces-a-torn-one"])
def test_killed_at_every_write_of_a_save_the_previous_one_is_taken(tmp_path, monkeypatch, replaces):
    """The kill wanders from the first write to the last; the folder is then absent, or complete and new."""
    kills, completed = 0, 0
    for strike in range(1, 200):
        output_dir = tmp_path / str(strike)
        previous = save(output_dir, 4)
        if replaces:
            (output_dir / "checkpoint-5").mkdir()
            (output_dir / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
        with monkeypatch.context() as patch:
            patch.setenv("R1V_FAULT", f"checkpoint_write:{strike}")
            status = run_in_child(lambda where=output_dir: save(where, 5))
        newest = checkpoints.latest_complete(output_dir)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        completed += newest == output_dir / "checkpoint-5"
        assert newest in (previous, output_dir / "checkpoint-5")
        checkpoints.clean_leftovers(output_dir)
        assert not [p for p in output_dir.iterdir() if p.name.startswith(".")]
        assert checkpoints.verify(save(output_dir, 5)) == []
        shutil.rmtree(output_dir)
    assert newest == output_dir / "checkpoint-5" and status == 0
    assert kills >= 18
    assert completed == 1, "the one kill after the last rename, and no other, may find the new folder complete"


def kill_before_file_operation(number: int, below: Path) -> None:
    """From now on, this process dies before its `number`-th Python file operation on a path below a folder."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(arguments[0]).startswith(
            str(below)
        ):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_before_every_file_operation_the_previous_one_is_taken(tmp_path):
    """Needs no help from the code under test: the interpreter itself reports each open, rename, mkdir and remove."""
    save(tmp_path, 4)
    for number in range(1, 200):
        status = run_in_child(lambda n=number: (kill_before_file_operation(n, tmp_path), save(tmp_path, 5)))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        final = tmp_path / "checkpoint-5"
        if final.exists():
            assert checkpoints.verify(final) == []
            shutil.rmtree(final)
        else:
            assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-4"
    assert number > 20
    assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-5"


def test_killed_between_the_two_renames_the_replaced_good_one_comes_back(tmp_path):
    path = save(tmp_path, 5)
    os.rename(path, tmp_path / ".replaced-checkpoint-5")
    (tmp_path / ".writing-checkpoint-5").mkdir()
    checkpoints.clean_leftovers(tmp_path)
    assert checkpoints.latest_complete(tmp_path) == path
    assert list(tmp_path.iterdir()) == [path]


def test_killed_by_the_kernel_in_the_middle_of_any_file(tmp_path):
    """SIGXFSZ strikes inside the write call itself, the Rust writer's too, wherever a file reaches the limit."""
    save(tmp_path, 1)
    sizes = sorted({p.stat().st_size for p in (tmp_path / "checkpoint-1").rglob("*") if p.is_file()})
    limits = sorted({limit for size in sizes for limit in (1, size // 2, size - 1)})
    for limit in limits:

        def limited_save(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(tmp_path, 2)

        assert run_in_child(limited_save) == -signal.SIGXFSZ
        assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-1"
        assert not (tmp_path / "checkpoint-2").exists()
    assert len(limits) >= 10
    checkpoints.clean_leftovers(tmp_path)
    assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-1"


def test_a_full_disk_raises_and_leaves_nothing_under_the_final_name(tmp_path):
    """RLIMIT_FSIZE with the signal ignored makes writes fail as they do on a full disk."""
    save(tmp_path, 1)
    for limit in (0, 100, 1000, 10_000):

        def limited_save(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                save(tmp_path, 2)
            except Exception:
                os._exit(42)

        assert run_in_child(limited_save) == 42
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
        assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-1"


def every_file(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


FILES = [
    "manifest.json",
    "model.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "reference/model.safetensors",
    "trainer_state.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["removed", "cut", "emptied", "flipped-first", "flipped-middle", "flipped-last"])
def test_every_damaged_file_is_found_and_named(tmp_path, caplog, name, fault):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    assert every_file(path) == FILES
    file = path / name
    data = bytearray(file.read_bytes())
    if fault == "removed":
        file.unlink()
    elif fault.startswith("flipped"):
        place = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[fault.removeprefix("flipped-")]
        data[place] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: -1 if fault == "cut" else 0])
    assert any(problem.startswith(name) for problem in checkpoints.verify(path))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2" in caplog.text and name in caplog.text


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    data = manifest.read_bytes()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        manifest.write_bytes(flipped)
        assert checkpoints._problems(path, hashes=False), f"bit {bit}"


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "rng.pth", "reference/x.pkl", "extra.safetensors"]
)
def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).write_bytes(b"\x80\x04.")
    assert checkpoints.verify(path) == [f"{name} is not in the manifest"]


def test_a_listed_pickle_or_link_is_refused_too(tmp_path):
    """Whoever writes a manifest of his own gets no pickle opened and no file from outside read."""
    secret = tmp_path / "secret.json"
    secret.write_bytes(b"{}")
    for name, wanted in [("optimizer.pt", "pickle"), ("../secret.json", "missing"), ("link.json", "plain file")]:
        folder = tmp_path / "checkpoint-1"
        folder.mkdir()
        if name == "link.json":
            (folder / name).symlink_to(secret)
        elif name == "optimizer.pt":
            (folder / name).write_bytes(b"{}")
        entry = {"size": 2, "sha256": checkpoints.file_sha256(secret)}
        write_file(folder / "manifest.json", checkpoints._render_manifest({"files": {name: entry}, "meta": {}}))
        assert [p for p in checkpoints.verify(folder) if p.startswith(name) and wanted in p]
        shutil.rmtree(folder)


def test_a_save_that_holds_a_pickle_is_not_committed(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"checkpoint-3 was about to hold training_args\.bin"),
        checkpoints.writing(tmp_path / "checkpoint-3") as temporary,
    ):
        torch.save({}, temporary / "training_args.bin")
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_is_none_and_other_names_are_ignored(tmp_path):
    assert checkpoints.latest_complete(tmp_path / "absent") is None
    for name in ("checkpoint-", "checkpoint-x", "my-checkpoint-3", "checkpoint-3.old", ".writing-checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints.latest_complete(tmp_path) is None
    (tmp_path / "checkpoint-9").mkdir()
    assert checkpoints.verify(tmp_path / "checkpoint-9") == ["manifest.json is missing"]
    assert checkpoints.latest_complete(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"checkpoint-9 is not a complete checkpoint: manifest\.json is missing"):
        checkpoints.read_meta(tmp_path / "checkpoint-9")


def test_the_newest_is_by_number_not_by_name_or_time(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    save(tmp_path, 2)
    assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-100"


def steps(output_dir: Path) -> list[int]:
    return sorted(checkpoints.step_of(p) for p in checkpoints.checkpoint_folders(output_dir))


def test_prune_keeps_the_newest_good_ones(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    assert checkpoints.prune(tmp_path, None) == []
    assert {p.name for p in checkpoints.prune(tmp_path, 2)} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert steps(tmp_path) == [4, 5]
    with pytest.raises(CheckpointError, match="save_total_limit must be at least 1, received 0"):
        checkpoints.prune(tmp_path, 0)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 16
    file.write_bytes(data)


def test_prune_keeps_the_best_one_beside_the_newest(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    deleted = checkpoints.prune(tmp_path, 2, also=[tmp_path / "checkpoint-1"])
    assert [p.name for p in deleted] == ["checkpoint-2"]


def test_prune_never_deletes_the_one_just_written(tmp_path):
    for step in (8, 10, 6):
        save(tmp_path, step)
    assert [p.name for p in checkpoints.prune(tmp_path, 1, also=[tmp_path / "checkpoint-6"])] == ["checkpoint-8"]
    assert steps(tmp_path) == [6, 10]


def test_later_ones_are_set_aside_whole_and_are_never_taken_or_deleted(tmp_path):
    for step in (5, 8, 10):
        save(tmp_path, step)
    aside = checkpoints.set_aside_after(tmp_path, 5)
    assert [path.name for path in aside] == ["checkpoint-10.replaced-1", "checkpoint-8.replaced-1"]
    assert [checkpoints.verify(path) for path in aside] == [[], []]
    save(tmp_path, 8)
    assert [path.name for path in checkpoints.set_aside_after(tmp_path, 5)] == ["checkpoint-8.replaced-2"]
    assert checkpoints.latest_complete(tmp_path) == tmp_path / "checkpoint-5"
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-5")
    assert checkpoints.clean_leftovers(tmp_path) == checkpoints.prune(tmp_path, 1) == []


def test_killed_while_later_ones_are_set_aside_the_first_ones_stay(tmp_path):
    for step in (5, 8, 10, 12):
        save(tmp_path, step)
    assert run_in_child(lambda: set_aside_and_die(tmp_path, 2)) == -signal.SIGKILL
    assert steps(tmp_path) == [5, 8, 10]
    checkpoints.set_aside_after(tmp_path, 5)
    assert steps(tmp_path) == [5] and len(list(tmp_path.glob("*.replaced-1"))) == 3


def set_aside_and_die(output_dir: Path, number: int) -> None:
    kill_before_file_operation(number, output_dir)
    checkpoints.set_aside_after(output_dir, 5)


def test_prune_never_deletes_the_last_good_one(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "checkpoint-4" / "model.safetensors")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    checkpoints.prune(tmp_path, 1)
    assert steps(tmp_path) == [2, 3, 4]
    flip_a_bit(tmp_path / "checkpoint-2" / "optimizer.json")
    assert checkpoints.prune(tmp_path, 1) == []


def test_a_torn_one_does_not_count_as_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3" / "optimizer.json").unlink()
    checkpoints.prune(tmp_path, 2)
    assert steps(tmp_path) == [2, 4]


def test_replace_file_keeps_the_old_content_when_the_write_fails(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    assert run_in_child(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2)), replace_file(path, b"newer"))) == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer"

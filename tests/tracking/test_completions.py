"""Stored rollouts come back as they were, once per step and once per image, whatever killed the run before."""

import math
import os
import resource

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1v_rl.tracking.completions import (
    CompletionRecord,
    RolloutStore,
    completion_lines,
    content_hash,
    image_path,
    read_rollouts,
    rollout_steps,
)

RED, BLUE = Image.new("RGB", (6, 4), (200, 0, 0)), Image.new("RGB", (4, 6), (0, 0, 200))


def record(index=0, **changes):
    values = dict(  # noqa: C408
        example_id=f"row-{index}",
        prompt="<image>How many?",
        completion=f"<think>\n{index}</think> \\boxed{{{index}}}",
        token_ids=[5, 151643, index],
        logprobs=[-0.1, -2.5, 0.0],
        rewards={"accuracy": 1.0, "format": 0.5},
        reward=0.9,
        advantage=-0.25,
        weight_version=3,
        is_truncated=False,
        answer=str(index),
        gold="7",
        images=(RED,),
    )
    return CompletionRecord(**(values | changes))


def test_every_column_comes_back(tmp_path):
    records = [record(1), record(2, images=(RED, BLUE)), record(3, images=(), extra={"kind": "count"})]
    path = RolloutStore(tmp_path).write(12, records)
    assert path == tmp_path / "rollouts" / "step-00000012.parquet"
    row = read_rollouts(tmp_path).to_pylist()[1]
    assert np.allclose(row.pop("logprobs"), [-0.1, -2.5, 0.0], atol=1e-7)
    assert row == {
        "step": 12,
        "example_id": "row-2",
        "prompt": "<image>How many?",
        "completion": "<think>\n2</think> \\boxed{2}",
        "token_ids": [5, 151643, 2],
        "rewards/accuracy": 1.0,
        "rewards/format": 0.5,
        "reward": 0.9,
        "advantage": -0.25,
        "answer": "2",
        "gold": "7",
        "weight_version": 3,
        "is_truncated": False,
        "image_hashes": [content_hash(RED), content_hash(BLUE)],
        "extra/kind": None,
    }
    assert read_rollouts(tmp_path, columns=["extra/kind"]).to_pylist()[2] == {"extra/kind": "count"}


def test_each_picture_is_stored_once_by_its_pixels(tmp_path):
    store = RolloutStore(tmp_path)
    for step in (1, 2):
        store.write(step, [record(i, images=(RED.copy(), BLUE)) for i in range(4)])
    assert sorted(p.name for p in (tmp_path / "rollouts" / "images").iterdir()) == sorted(
        f"{content_hash(image)}.png" for image in (RED, BLUE)
    )
    with Image.open(image_path(tmp_path, content_hash(BLUE))) as stored:
        assert stored.mode == "RGB" and stored.tobytes() == BLUE.tobytes()


def test_the_hash_is_of_size_and_pixels():
    assert content_hash(RED) == content_hash(RED.convert("RGBA"))
    assert content_hash(RED) != content_hash(RED.transpose(Image.Transpose.ROTATE_90))
    changed = RED.copy()
    changed.putpixel((5, 3), (200, 0, 1))
    assert content_hash(RED) != content_hash(changed)


def test_a_step_written_again_replaces_itself(tmp_path):
    store = RolloutStore(tmp_path)
    store.write(4, [record(1), record(2)])
    store.write(5, [record(3)])
    first = (tmp_path / "rollouts" / "step-00000004.parquet").read_bytes()
    store.write(4, [record(1), record(2)])
    assert (tmp_path / "rollouts" / "step-00000004.parquet").read_bytes() == first
    assert rollout_steps(tmp_path) == [4, 5] and len(read_rollouts(tmp_path)) == 3


def test_a_resume_forgets_the_steps_beyond_it(tmp_path):
    store = RolloutStore(tmp_path)
    for step in (0, 1, 2, 3):
        store.write(step, [record()])
    store.forget_after(1)
    assert rollout_steps(tmp_path) == [0, 1]
    store.forget_after(-1)
    assert rollout_steps(tmp_path) == [] and len(read_rollouts(tmp_path)) == 0


def test_a_full_disk_leaves_the_stored_step_as_it_was(tmp_path):
    store = RolloutStore(tmp_path)
    store.write(1, [record(1)])
    before = read_rollouts(tmp_path).to_pylist()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            store.write(1, [record(2, images=(BLUE,))])
        except OSError:
            os._exit(42)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert read_rollouts(tmp_path).to_pylist() == before
    assert not list((tmp_path / "rollouts").rglob(".*"))


def test_what_could_not_be_judged_is_null_and_stays_apart_from_zero(tmp_path):
    rewards = {"accuracy": None, "format": math.nan, "bonus": 0.0}
    RolloutStore(tmp_path).write(1, [record(rewards=rewards, reward=math.nan, advantage=None, answer=None, gold=None)])
    (row,) = read_rollouts(tmp_path).to_pylist()
    assert [row[f"rewards/{name}"] for name in rewards] == [None, None, 0.0]
    assert row["reward"] is row["advantage"] is row["answer"] is row["gold"] is None


def test_hostile_text_is_stored_and_shown_without_harm(tmp_path):
    text = "a\x00b \ud800 \x1b[2J <script>alert(1)</script> \u202e 中"
    RolloutStore(tmp_path).write(1, [record(completion=text)])
    assert read_rollouts(tmp_path)["completion"][0].as_py() == text.replace("\ud800", "\\ud800")
    shown = completion_lines([record(completion=text), record(completion="x" * 700)], limit=2)
    assert "\x1b" not in shown and "\x00" not in shown and "\\x1b[2J" in shown and "中" in shown
    assert shown.splitlines()[-1].endswith("... (700 characters)")
    assert completion_lines([record()] * 3, limit=1).count("[row-0]") == 1


def test_steps_with_other_rewards_are_read_together(tmp_path):
    store = RolloutStore(tmp_path)
    store.write(1, [record(rewards={"accuracy": 1.0})])
    store.write(2, [record(rewards={"judge": 0.5})])
    rows = read_rollouts(tmp_path).to_pylist()
    assert [(row["rewards/accuracy"], row["rewards/judge"]) for row in rows] == [(1.0, None), (None, 0.5)]
    assert [row["step"] for row in read_rollouts(tmp_path, steps=[2]).to_pylist()] == [2]


def test_ranks_write_files_of_their_own(tmp_path):
    for rank in (0, 1):
        RolloutStore(tmp_path, rank=rank).write(3, [record(rank)])
    assert rollout_steps(tmp_path) == [3]
    assert sorted(read_rollouts(tmp_path)["example_id"].to_pylist()) == ["row-0", "row-1"]


def test_the_file_is_plain_parquet(tmp_path):
    schema = pq.read_schema(RolloutStore(tmp_path).write(1, [record()]))
    assert str(schema.field("logprobs").type) == "list<element: float>"
    assert str(schema.field("token_ids").type) == "list<element: int32>"


@pytest.mark.parametrize("name", ["step-1.parquet.tmp", "step-x.parquet", ".step-00000001.parquet.77"])
def test_other_files_are_not_read(tmp_path, name):
    RolloutStore(tmp_path).write(1, [record()])
    (tmp_path / "rollouts" / name).write_bytes(b"half")
    assert rollout_steps(tmp_path) == [1] and len(read_rollouts(tmp_path)) == 1

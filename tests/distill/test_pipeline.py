"""A distillation against a scripted endpoint: what comes out, what is paid, what a kill and a fault change."""

import json
import os
import shutil
from random import Random

import pytest
from distill.distill_run import OUTPUTS, assessment, chain, reply, rows_of, run, write_rows
from random_vlm import save_random_vlm
from scoring.chat_server import ChatServer

from r1v_rl.data.dataset import load_examples

NUM_ROWS = 20


class Server(ChatServer):
    """Answers by `script(request, tries)`; a model says the same thing to the same request."""

    def __init__(self, script=lambda request, tries: reply(request)):
        super().__init__(lambda text, tries: self.script(self.latest(text), tries))
        self.script = script

    def latest(self, text):
        with self._lock:
            return next(r for r in reversed(self.requests) if r["messages"][0]["content"] == text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """(folder, requests) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_rows(folder / "rows.jsonl", NUM_ROWS)
    server = Server()
    assert run(folder, model, server.base_url) == 0, (folder / "log.txt").read_text()
    server.close()
    return folder, server.requests


def test_what_is_kept_revised_and_dropped(undisturbed):
    folder, _ = undisturbed
    rows = rows_of(folder)
    assert len(rows) == NUM_ROWS
    for i, row in enumerate(rows):
        if i % 2 == 0:
            assert row["kept"]["source"] == "own" and row["reason"] == "the shortest of 2 right chains in 2"
            assert row["kept"]["num_tokens"] == min(chain["num_tokens"] for chain in row["chains"])
        elif i % 10 == 9:
            assert row["kept"] is None and "of 2 chains 2 wrong" in row["reason"]
            assert "no think block" in row["reason"]
        else:
            assert row["kept"]["source"] == "revised" and "revision 2" in row["reason"]
            assert [c["source"] for c in row["chains"]] == ["own", "own", "revised", "revised"]
    kept = rows_of(folder, "dataset.parquet")
    assert [row["id"] for row in kept] == [row["id"] for row in rows if row["kept"]]
    assert all(f"\\boxed{{{row['answer']}}}" in row["completion"] for row in kept)


def test_the_penalty_of_a_row_goes_with_its_requests(undisturbed):
    """Text alone: the text score is quality, difficulty and reasoning demand, which are (i, i+1, i+2) mod 6."""
    folder, requests = undisturbed
    rows = rows_of(folder)
    assert {row["vision"] for row in rows} == {None}
    means = [sum((i + k) % 6 for k in range(3)) / 15 for i in range(NUM_ROWS)]
    assert [row["text"] for row in rows] == pytest.approx(means)
    scaled = [(mean - min(means)) / (max(means) - min(means)) for mean in means]
    assert [row["score"] for row in rows] == pytest.approx(scaled)
    sent = {}
    for request in requests:
        if request["model"] == "writer":
            sent.setdefault(request["messages"][0]["content"], set()).add(request.get("repetition_penalty", 1.0))
    assert [sent[f"Row {i}: what is {i} plus 7?"] for i in range(NUM_ROWS)] == [{row["penalty"]} for row in rows]
    assert min(row["penalty"] for row in rows) == 1.0 and max(row["penalty"] for row in rows) == 2.0


def test_what_it_leaves_is_a_data_set(undisturbed):
    folder, _ = undisturbed
    examples = load_examples(str(folder / "out/dataset.parquet"))
    assert examples[0].columns["completion"].endswith("</think>\n\\boxed{7}")
    assert examples[0].columns["distill"]["source"] == "own"
    card = (folder / "out/README.md").read_text()
    assert card.startswith("---\n") and "18 of 20 rows" in card
    assert "| 2 | no right chain, last revision: no think block" in card
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert manifest["stage"] == "distill" and manifest["metrics"]["kept_revised"] == 8


def contents(folder):
    """What a run leaves, the name of its folder taken out."""
    return {name: (folder / "out" / name).read_bytes().replace(str(folder).encode(), b"") for name in OUTPUTS}


def test_again_and_nothing_is_asked(undisturbed, model, server, tmp_path):
    """The folder is complete; without its manifest everything is made again from what is kept, byte by byte."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "out/manifest.json").unlink()
    assert run(tmp_path, model, server.base_url) == 0
    assert not server.requests
    assert contents(tmp_path) == contents(undisturbed[0])


def test_only_a_changed_row_is_done_again(undisturbed, model, server, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("Row 4: what", "Row 4: tell me what")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert run(tmp_path, model, server.base_url) == 0
    assert [r["model"] for r in server.requests] == ["judge", "writer", "writer"]
    assert all("tell me" in r["messages"][0]["content"] for r in server.requests)


LONG = (500, 20)
"""Rows and kills with R1V_LONG=1: ten minutes on a quiet core."""


@pytest.mark.parametrize(("num_rows", "num_kills"), [LONG if os.environ.get("R1V_LONG") else (NUM_ROWS, 4)])
def test_killed_anywhere_every_call_is_paid_once(undisturbed, model, server, tmp_path, num_rows, num_kills):
    """Killed within writes of replies, and once of results: what is asked twice was in flight or half written."""
    folder, requests = undisturbed
    if num_rows != NUM_ROWS:
        folder = tmp_path / "undisturbed"
        folder.mkdir()
        write_rows(folder / "rows.jsonl", num_rows)
        first = Server()
        assert run(folder, model, first.base_url) == 0
        requests = first.requests
        first.close()
    write_rows(tmp_path / "rows.jsonl", num_rows)
    rng = Random(7)
    spread = 3 * len(requests) // (num_kills + 1)  # each reply passes the point three times
    kills = [f"reply_write:{rng.randrange(1, spread)}" for _ in range(num_kills - 1)] + ["file_write:2"]
    for fault in kills:
        assert run(tmp_path, model, server.base_url, fault) == -9, fault
    assert run(tmp_path, model, server.base_url) == 0
    needed, asked = len(requests), len(server.requests)
    print(f"{num_kills} kills: {asked} calls for {needed}")
    assert needed <= asked <= needed + num_kills * 8, "8 may be in flight"
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("budget", [1, 30])
def test_a_budget_of_calls_stops_at_it(model, server, tmp_path, budget):
    """Retries count; a run that was stopped and begun again spends nothing more, and a higher budget goes on."""
    write_rows(tmp_path / "rows.jsonl", NUM_ROWS)
    assert run(tmp_path, model, server.base_url, budget_calls=budget) == 2
    assert len(server.requests) == budget
    assert "the budget is reached" in (tmp_path / "log.txt").read_text()
    assert run(tmp_path, model, server.base_url, budget_calls=budget) == 2
    assert len(server.requests) == budget
    assert run(tmp_path, model, server.base_url, budget_calls=budget + 5) == 2
    assert len(server.requests) == budget + 5


def test_faults_are_retried_a_few_times_then_unscored(model, tmp_path):
    """Rows 0 to 5 fail in a way of their own, for good; the others are scored, and none gets a 0."""
    write_rows(tmp_path / "rows.jsonl", 12)
    faults = {
        0: 429, 1: 500, 2: assessment(2)[:60], 3: "I cannot assist with that.",
        4: assessment(4).replace('"score": 5', '"score": 9'), 5: b'{"choices": [',
    }  # fmt: skip

    def script(request, tries):
        if request["model"] != "judge":
            return reply(request)
        row = int(request["messages"][0]["content"].split("Row ")[1].split(":")[0])
        return faults.get(row, assessment(row))

    server = Server(script)
    try:
        assert run(tmp_path, model, server.base_url, num_revisions=0, judge_concurrency=1) == 0
    finally:
        server.close()
    rows = rows_of(tmp_path)
    for i, row in enumerate(rows[:6]):
        assert row["text"] is None and row["penalty"] == 1.0, "unscored is not 0"
        assert row["sub_scores"]["quality"]["value"] is None
        assert row["sub_scores"]["quality"]["reason"].startswith("unscored: "), i
    assert all(row["text"] is not None for row in rows[6:])
    asked = {}
    for request in server.requests:
        if request["model"] == "judge":
            row = int(request["messages"][0]["content"].split("Row ")[1].split(":")[0])
            asked[row] = asked.get(row, 0) + 1
    assert [asked[i] for i in range(5)] == [3, 3, 3, 3, 3] and asked[5] <= 9
    assert all(asked[i] == 1 for i in range(6, 12))


def test_dry_run_asks_nobody(undisturbed, model, server, tmp_path):
    write_rows(tmp_path / "rows.jsonl", NUM_ROWS)
    assert run(tmp_path, model, server.base_url, dry_run=True, judge_price=[2.0, 10.0]) == 0
    log = (tmp_path / "log.txt").read_text()
    assert not server.requests and not (tmp_path / "out/manifest.json").exists()
    assert [line.split()[2] for line in log.splitlines() if line.startswith("assess")] == ["20"]


def test_nothing_is_paid_for_rows_of_a_benchmark(model, server, tmp_path):
    write_rows(tmp_path / "rows.jsonl", NUM_ROWS)
    write_rows(tmp_path / "tested.jsonl", 3)
    benchmarks = [f"math500={tmp_path}/tested.jsonl"]
    assert run(tmp_path, model, server.base_url, dry_run=True, contamination_benchmarks=benchmarks) == 0
    log = (tmp_path / "log.txt").read_text()
    assert [line.split()[2] for line in log.splitlines() if line.startswith("assess")] == ["17"]
    assert chain(1).startswith("<think>")

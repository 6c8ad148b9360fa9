"""Grader processes: deadlines that hold, deaths that are survived, nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from r1v_rl.errors import UserError
from r1v_rl.scoring import GraderPool, check_golds, judge_answer
from r1v_rl.scoring.workers import reason_rates

HANGS = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "float exponent": r"\boxed{1.5E9999999+x}",
    "harmonic sum": r"\boxed{\sum_{i=1}^{1000000000} \frac{1}{i^2+\sin(i)}}",
}
"""Each keeps math-verify busy for minutes; the second does so in one C call, where no signal handler can run."""
DEADLINE_S = 0.6
SLACK_S = 0.3


def exists(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def wait_until_gone(pids, limit_s=5.0):
    end = time.monotonic() + limit_s
    while any(map(exists, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(exists, pids))


def judge_timed(pool, completion):
    started = time.monotonic()
    (verdict,) = pool.judge_answers([completion], ["5"], timeout_s=DEADLINE_S)
    return verdict, time.monotonic() - started


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def in_event_loop(function):
    async def main():
        return await asyncio.to_thread(function), function()

    (verdict, wall_s), (_, blocking_wall_s) = asyncio.run(main())
    return verdict, max(wall_s, blocking_wall_s)


@pytest.mark.parametrize("runner", [lambda f: f(), in_thread, in_event_loop], ids=["main", "thread", "asyncio"])
@pytest.mark.parametrize("name", HANGS)
def test_a_hostile_answer_is_cut_off_at_its_deadline(pool, runner, name):
    verdict, wall_s = runner(lambda: judge_timed(pool, HANGS[name]))
    assert (verdict.correct, verdict.reason) == (False, "timeout")
    assert wall_s < DEADLINE_S + SLACK_S


_RANK = """
import sys, time
from r1v_rl.scoring.workers import shared_pool
pool = shared_pool()
pool.judge_answers([r"\\boxed{x+1}"], ["1+x"])
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = memory()
for hostile in sys.argv[1:]:
    started = time.monotonic()
    (verdict,) = pool.judge_answers([hostile], ["5"], timeout_s=0.6)
    print(verdict.reason, time.monotonic() - started, memory() - before)
print(*pool.worker_pids())
"""


def test_two_ranks_judge_each_with_graders_of_its_own():
    command = [sys.executable, "-c", _RANK, *HANGS.values(), r"\boxed{\operatorname{zeros}(100000,100000)}"]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}, stdout=-1, text=True)
        for rank in range(2)
    ]
    pids = []
    for rank in ranks:
        *verdicts, workers = rank.communicate(timeout=60)[0].splitlines()
        rows = [line.rsplit(" ", 2) for line in verdicts]
        assert [reason for reason, *_ in rows[:3]] == ["timeout"] * 3 and rows[3][0] != "right"
        assert all(float(wall_s) < DEADLINE_S + SLACK_S and float(grown_mb) < 50 for _, wall_s, grown_mb in rows)
        pids += map(int, workers.split())
    assert len(set(pids)) == len(pids) >= 2 and wait_until_gone(pids)


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{1.5E9999999}",
        r"\boxed{\Gamma(2000)}",
        r"\boxed{\binom{20000}{10000}}",
        r"\boxed{\operatorname{zeros}(100000,100000)}",
        r"\boxed{" + r"[0,1)\cup" * 300 + "[1,2]}",
        r"\boxed{" + "(" * 300 + "5" + ")" * 300 + "}",
        "\\boxed{\ud800}",
        "\\boxed{5\x00}",
        r"\boxed{" + "9" * 1_000_000 + "}",
    ],
)
def test_an_answer_that_breaks_other_graders_is_merely_not_right(pool, completion):
    verdict, wall_s = judge_timed(pool, completion)
    assert verdict.correct is False
    assert wall_s < DEADLINE_S + SLACK_S


def test_equal_answers_are_judged_once_even_if_they_time_out(pool):
    kills = pool.num_kills
    started = time.monotonic()
    verdicts = pool.judge_answers([HANGS["tower"]] * 8 + [r"\boxed{x+1}"], ["5"] * 8 + ["1+x"], timeout_s=DEADLINE_S)
    assert [v.reason for v in verdicts] == ["timeout"] * 8 + ["right"]
    assert pool.num_kills == kills + 1
    assert time.monotonic() - started < 2 * DEADLINE_S


def test_idle_workers_that_are_shot_are_replaced(pool):
    pool.judge_answers([HANGS["tower"], r"\boxed{x+1}"], ["5", "1+x"], timeout_s=0.1)
    pool.judge_answers([rf"\boxed{{x+{i}}}" for i in range(2, 40)], [f"{i}+x" for i in range(2, 40)])
    pids = pool.worker_pids()
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until_gone(pids)
    assert pool.judge_answers([r"\boxed{x+3}"], ["3+x"])[0].reason == "right"


@pytest.mark.parametrize(("num_shots", "correct", "reason"), [(1, False, "timeout"), (2, None, "crashed")])
def test_an_answer_is_tried_again_after_the_first_death_of_its_worker_only(num_shots, correct, reason):
    with GraderPool(num_workers=1) as pool:
        pool.judge_answers([r"\boxed{x+1}"], ["1+x"])
        shot = set()

        def shoot():
            end = time.monotonic() + 3.0
            while len(shot) < num_shots and time.monotonic() < end:
                for pid in set(pool.worker_pids()) - shot:
                    time.sleep(0.1)
                    os.kill(pid, signal.SIGKILL)
                    shot.add(pid)
                time.sleep(0.005)

        marksman = threading.Thread(target=shoot)
        marksman.start()
        (verdict,) = pool.judge_answers([HANGS["tower"]], ["5"], timeout_s=0.8)
        marksman.join()
        assert (verdict.correct, verdict.reason) == (correct, reason)
        assert pool.judge_answers([r"\boxed{x+1}"], ["1+x"])[0].correct


def test_the_process_that_forks_workers_may_die_too():
    with GraderPool(num_workers=1) as pool:
        pool.judge_answers([r"\boxed{x+1}"], ["1+x"])
        os.kill(pool._forker._process.pid, signal.SIGKILL)
        assert wait_until_gone(pool.worker_pids())
        assert pool.judge_answers([r"\boxed{x+1}"], ["1+x"])[0].correct


def test_close_leaves_no_process():
    pool = GraderPool(num_workers=2)
    pool.judge_answers([r"\boxed{x+1}", r"\boxed{x+2}"], ["1+x", "2+x"])
    pids = [*pool.worker_pids(), pool._forker._process.pid]
    assert len(pids) == 3 and all(map(exists, pids))
    pool.close()
    pool.close()
    assert wait_until_gone(pids, 1.0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.judge_answers([r"\boxed{x+1}"], ["1+x"])


def test_graders_die_with_the_process_that_uses_them_also_in_the_middle_of_an_answer():
    script = (
        "import os, threading, time\nfrom r1v_rl.scoring import GraderPool\npool = GraderPool(2)\n"
        "pool.judge_answers([r'\\boxed{x+1}', r'\\boxed{x+2}'], ['1+x', '2+x'])\n"
        f"hang = lambda: pool.judge_answers([r'{HANGS['tower']}'], ['5'], timeout_s=60)\n"
        "threading.Thread(target=hang).start()\n"
        "time.sleep(0.3)\nbystander = os.fork()\nif bystander == 0: time.sleep(60)\n"
        "print(bystander, *pool.worker_pids(), pool._forker._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        bystander, *pids = [int(word) for word in trainer.stdout.readline().split()]
        trainer.kill()
    try:  # a data loader, say, that outlives its trainer and holds copies of the sockets
        assert len(pids) == 3 and exists(bystander)
        assert wait_until_gone(pids)
    finally:
        os.kill(bystander, signal.SIGKILL)


def test_a_forked_process_gets_graders_of_its_own(pool):
    pids = pool.worker_pids()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            is_right = pool.judge_answers([r"\boxed{x+9}"], ["9+x"])[0].correct
            status = 0 if is_right and not set(pool.worker_pids()) & set(pids) else 2
            pool.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.judge_answers([r"\boxed{x+8}"], ["8+x"])[0].correct


def test_many_threads_share_the_workers(pool):
    wrong = []

    def judge(number):
        golds = [f"{number}+x^{i}" for i in range(6)]
        verdicts = pool.judge_answers([rf"\boxed{{x^{i}+{number}}}" for i in range(6)], golds)
        wrong.extend(v for v in verdicts if v.correct is not True)

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool.worker_pids()) <= 2


def test_what_an_inference_engine_exports_does_not_reach_the_graders(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/libengine.so")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    with GraderPool(num_workers=1) as pool:
        pool.judge_answers([r"\boxed{x+1}"], ["1+x"])
        with open(f"/proc/{pool.worker_pids()[0]}/environ") as environment:
            exported = environment.read()
    assert "LD_PRELOAD" not in exported and "canary" not in exported


def test_the_callers_own_alarm_still_fires(pool):
    fired = []
    previous = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    try:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        judge_timed(pool, HANGS["tower"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(fired) == 1 and fired[0] - started < 0.5


def test_importing_the_package_loads_neither_torch_nor_sympy():
    script = "import sys, r1v_rl.scoring; print([m for m in ('torch', 'sympy', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("timeout_s", [0, -1, None, "5", float("inf"), float("nan"), True])
def test_a_deadline_that_is_none_is_refused(timeout_s):
    with pytest.raises(UserError, match="reward_timeout_s must be a positive number"):
        judge_answer(r"\boxed{5}", "5", timeout_s=timeout_s)


def test_a_gold_that_cannot_be_read_is_said_so_and_never_counts_against_the_answer(pool):
    verdicts = pool.judge_answers([r"\boxed{7+x}"] * 3, [None, "", r"\frac{1}{"])
    assert [(v.correct, v.reason) for v in verdicts] == [(None, "unparsable")] * 3
    problems = check_golds(["5", r"3\sqrt{2}", "(1,2)", "Monday", "", None, r"\frac{1}{", "!!!"])
    assert problems[:4] == [None] * 4
    assert all("gold answer" in problem for problem in problems[4:])
    assert check_golds(["B", "red", "violet"], "choice", [["blue", "red"]] * 3)[:2] == [None, None]
    assert "one option" in check_golds(["violet"], "choice", [["blue", "red"]])[0]


def test_a_worker_forgets_what_it_has_judged():
    from sympy.core import random

    from r1v_rl.scoring import equivalence, grader_process

    states = []
    for gold, answer in ((r"\sin^2 x+\cos^2 x", "1"), (r"\sqrt{\infty}", r"50\%"), ("x^2", "x")):
        grader_process.answer_request({"op": "same", "gold": gold, "answer": answer})
        equivalence.forget()
        states.append(
            (random.rng.getstate(), random._assumptions_rng.getstate(), equivalence.read_formula.cache_info())
        )
    assert states[0] == states[1] == states[2] and states[0][2].currsize == 0
    grader_process.answer_request({"op": "same", "gold": "x^2", "answer": "x"})
    size = equivalence.read_formula.cache_info().currsize
    grader_process.answer_request({"op": "same", "gold": "y^2", "answer": "y"})
    assert equivalence.read_formula.cache_info().currsize == size


def test_verdicts_are_counted_by_reason(pool):
    before = pool.counts.copy()
    verdicts = pool.judge_answers([r"\boxed{5}", r"\boxed{6}", "<think>", r"\boxed{\frac{1}{}"], ["5"] * 4)
    assert pool.counts - before == {"right": 1, "wrong": 1, "no answer": 2}
    assert reason_rates(verdicts)["reward_workers/no_answer"] == 0.5


def test_lengths_must_agree(pool):
    with pytest.raises(UserError, match="equal lengths; received 1, 2, 1 and 1"):
        pool.judge_answers(["5"], ["5", "6"])

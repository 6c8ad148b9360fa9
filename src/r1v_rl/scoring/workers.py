"""Verdicts from persistent worker processes: a deadline that holds in C code too, a memory limit, and no orphan.

    with GraderPool(num_workers=2) as pool:
        pool.judge_answers([r"</think>\\boxed{\\frac12}"], ["0.5"])

Whatever reading alone can decide is decided here, in the caller's process, by one pass of expressions that cannot
backtrack (`answers.quick_verdict`): integers, decimals, fractions, letters, words, equal strings. Only the rest goes
to a worker.
"""

import atexit
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from r1v_rl.errors import UserError
from r1v_rl.scoring.answers import REASONS, Verdict, parse_gold, quick_verdict, verdict
from r1v_rl.scoring.extraction import find_answer
from r1v_rl.scoring.processes import Forker, Worker, WorkerDied

DEFAULT_TIMEOUT_S = 2.0
DEFAULT_NUM_WORKERS = 2
_TIMED_OUT: dict[str, Any] = {"failure": "timeout"}
_CRASHED: dict[str, Any] = {"failure": "crashed"}
_Job = tuple[int, int]
"""Index of the request, and how often a worker has already died on it."""


class GraderPool:
    """Grader processes that any thread may use. They start on first use (about a second) or by `start()`."""

    def __init__(self, num_workers: int = DEFAULT_NUM_WORKERS, memory_mb: int = 2048):
        if num_workers < 1:
            raise UserError(f"reward_workers must be at least 1; received {num_workers}")
        self.num_workers = num_workers
        self.counts: Counter[str] = Counter()
        """Verdicts by reason since the pool was made."""
        self.num_kills = 0
        self._forker = Forker(memory_mb)
        self._reset()
        atexit.register(self.close)

    def _reset(self) -> None:
        self._owner_pid = os.getpid()
        self._condition = threading.Condition()
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []
        self._num_starting = 0
        self._is_closed = False

    def __enter__(self) -> "GraderPool":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Load the grader in the background, so that the first verdict need not wait for it."""
        self._forker.start()

    def close(self) -> None:
        """Kill every worker and the process they came from; safe to call twice. A forked copy of the pool owns none."""
        if os.getpid() != self._owner_pid:
            return
        with self._condition:
            self._is_closed = True
            workers, self._workers, self._idle = self._workers, [], []
            self._condition.notify_all()
        for worker in workers:
            worker.kill()
        self._forker.stop()
        atexit.unregister(self.close)

    def worker_pids(self) -> list[int]:
        """The pids of the workers that run now."""
        with self._condition:
            return [worker.pid for worker in self._workers]

    def judge_answers(
        self,
        completions: Sequence[str],
        golds: Sequence[Any],
        kind: str | Sequence[str] = "math",
        choices: Sequence[Sequence[str] | None] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[Verdict]:
        """One verdict per completion. Equal pairs of answer and gold are judged once, failures included.

        Args:
            golds: One gold answer per completion; None, or one that cannot be read, gives `correct` None.
            kind: `math`, `number`, `choice` or `text`, for all or one per completion.
            choices: The options of each completion's question.
            timeout_s: Deadline for each answer, counted from the moment a worker takes it up.

        Raises:
            UserError: If the lengths differ, or the deadline or a kind is not usable.
        """
        check_timeout(timeout_s)
        self._leave_to_parent()
        kinds = [kind] * len(completions) if isinstance(kind, str) else list(kind)
        options = [None] * len(completions) if choices is None else list(choices)
        if not len(completions) == len(golds) == len(kinds) == len(options):
            raise UserError(
                "completions, golds, kinds and choices must have equal lengths; received "
                f"{len(completions)}, {len(golds)}, {len(kinds)} and {len(options)}"
            )
        keys = [_key(*row) for row in zip(completions, golds, kinds, options, strict=True)]
        judged: dict[Any, Verdict] = {}
        undecided: list[tuple[str, str, str, Any]] = []
        for key in dict.fromkeys(keys):
            decided = key if isinstance(key, Verdict) else quick_verdict(key[0], key[1], key[2], key[3])
            if decided is not None:
                judged[key] = decided
            elif not isinstance(key, Verdict):
                undecided.append(key)
        replies = self.ask([{"op": "same", "gold": key[1], "answer": key[0]} for key in undecided], timeout_s)
        judged.update((key, _from_reply(key[0], reply)) for key, reply in zip(undecided, replies, strict=True))
        verdicts = [judged[key] for key in keys]
        with self._condition:
            self.counts.update(item.reason for item in verdicts)
        return verdicts

    def match(self, pattern: str, texts: Sequence[str], timeout_s: float = DEFAULT_TIMEOUT_S) -> list[bool | None]:
        """Whether `re.search` finds the pattern in each text; None where it did not end within the deadline."""
        replies = self.ask([{"op": "match", "pattern": pattern, "text": text} for text in texts], timeout_s)
        return [reply.get("correct") for reply in replies]

    def ask(self, requests: Sequence[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
        """One reply per request, or `{"failure": "timeout" | "crashed"}`; uses as many workers as are free."""
        self._leave_to_parent()
        replies: list[dict[str, Any]] = [_CRASHED] * len(requests)
        pending: deque[_Job] = deque((index, 0) for index in range(len(requests)))
        busy: dict[Worker, tuple[_Job, float]] = {}
        try:
            while pending or busy:
                self._hand_out(requests, pending, busy, timeout_s)
                self._collect(pending, busy, replies)
        finally:
            for worker in busy:
                self._discard(worker)
        return replies

    def _hand_out(
        self,
        requests: Sequence[dict[str, Any]],
        pending: "deque[_Job]",
        busy: "dict[Worker, tuple[_Job, float]]",
        timeout_s: float,
    ) -> None:
        while pending and (worker := self._acquire(wait=not busy)) is not None:
            job = pending.popleft()
            try:
                worker.send(requests[job[0]], timeout_s)
                busy[worker] = (job, time.monotonic() + timeout_s)
            except WorkerDied:
                self._worker_died(worker, job, pending)

    def _collect(
        self, pending: "deque[_Job]", busy: "dict[Worker, tuple[_Job, float]]", replies: list[dict[str, Any]]
    ) -> None:
        """Wait for one reply, death or deadline, and deal with all that have come."""
        if not busy:
            return
        wait_s = max(0.0, min(deadline for _, deadline in busy.values()) - time.monotonic())
        poller = select.poll()  # select() cannot take descriptors above 1023
        by_descriptor = {worker.channel.fileno(): worker for worker in busy}
        for descriptor in by_descriptor:
            poller.register(descriptor, select.POLLIN)
        # A worker that another thread gives back would serve the rest of our queue: look again now and then.
        ready = {by_descriptor[fd] for fd, _ in poller.poll(min(wait_s, 0.05 if pending else wait_s) * 1000 + 1)}
        for worker, (job, deadline) in list(busy.items()):
            if worker in ready:
                try:
                    reply = worker.receive()
                except WorkerDied:
                    del busy[worker]
                    self._worker_died(worker, job, pending)
                    continue
                if reply is not None:
                    del busy[worker]
                    replies[job[0]] = reply
                    self._give_back(worker)
            elif time.monotonic() >= deadline:
                del busy[worker]
                replies[job[0]] = _TIMED_OUT
                self._discard(worker)

    def _worker_died(self, worker: Worker, job: _Job, pending: "deque[_Job]") -> None:
        """Try the request once more in a fresh worker; a second death leaves it `crashed`."""
        self._discard(worker)
        if job[1] == 0:
            pending.appendleft((job[0], 1))

    def _acquire(self, *, wait: bool) -> Worker | None:
        with self._condition:
            while True:
                if self._is_closed:
                    raise RuntimeError("this GraderPool is closed")
                while self._idle:
                    worker = self._idle.pop()
                    if worker.is_alive():
                        return worker
                    self._workers.remove(worker)
                    worker.kill()
                if len(self._workers) + self._num_starting < self.num_workers:
                    self._num_starting += 1
                    break
                if not wait:
                    return None
                self._condition.wait()
        try:
            worker = self._forker.fork_worker()
        except BaseException:
            with self._condition:
                self._num_starting -= 1
                self._condition.notify()
            raise
        with self._condition:
            self._num_starting -= 1
            self._workers.append(worker)
        return worker

    def _give_back(self, worker: Worker) -> None:
        if worker.should_retire:
            self._discard(worker)
            return
        with self._condition:
            self._idle.append(worker)
            self._condition.notify()

    def _discard(self, worker: Worker) -> None:
        worker.kill()
        with self._condition:
            self.num_kills += 1
            if worker in self._workers:
                self._workers.remove(worker)
            self._condition.notify()

    def _leave_to_parent(self) -> None:
        """In a forked copy of the process that made the pool, start afresh: workers and sockets are the parent's."""
        if os.getpid() == self._owner_pid:
            return
        for worker in self._workers:
            worker.close()
        self._forker.abandon()
        self._reset()


_shared: GraderPool | None = None
_shared_lock = threading.Lock()


def shared_pool(num_workers: int = DEFAULT_NUM_WORKERS) -> GraderPool:
    """The process's own pool, made on first use, with at least `num_workers` workers; closed when the process ends."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared._is_closed:
            _shared = GraderPool(num_workers)
        _shared.num_workers = max(_shared.num_workers, num_workers)
        return _shared


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def judge_answers(
    completions: Sequence[str],
    golds: Sequence[Any],
    kind: str | Sequence[str] = "math",
    choices: Sequence[Sequence[str] | None] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Verdict]:
    """`GraderPool.judge_answers` of the process's own pool."""
    return shared_pool().judge_answers(completions, golds, kind, choices, timeout_s)


def judge_answer(
    completion: str,
    gold: Any,
    kind: str = "math",
    choices: Sequence[str] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Verdict:
    """The verdict on one completion, from any thread, within `timeout_s` of a worker taking it up."""
    return judge_answers([completion], [gold], kind, [choices], timeout_s)[0]


def check_golds(
    answers: Sequence[Any],
    kind: str = "math",
    choices: Sequence[Sequence[str] | None] | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[str | None]:
    """For each gold answer, None where it can be read as `kind`, else what is wrong with it, for a message that adds
    the row."""
    check_timeout(timeout_s)
    options = [None] * len(answers) if choices is None else list(choices)
    problems: list[str | None] = [None] * len(answers)
    unread: list[tuple[int, str]] = []
    for index, (answer, row_choices) in enumerate(zip(answers, options, strict=True)):
        try:
            gold = parse_gold(answer, kind)
        except UserError as error:
            problems[index] = str(error)
            continue
        if kind == "choice" and quick_verdict(gold, gold, kind, row_choices) != verdict(True, gold):
            problems[index] = f"the gold answer must name one option by its letter or its text; received {gold[:80]!r}"
        elif kind in ("math", "number") and not is_plain(gold):
            unread.append((index, gold))
    replies = shared_pool().ask([{"op": "read", "gold": gold} for _, gold in unread], timeout_s) if unread else []
    for (index, gold), reply in zip(unread, replies, strict=True):
        if not reply.get("correct"):
            problems[index] = (
                f"the gold answer cannot be read as a formula; received {gold[:80]!r}: write it in LaTeX, or set "
                "answer_kind to "
                "text or choice"
            )
    return problems


def check_gold(answer: Any, kind: str = "math", choices: Sequence[str] | None = None) -> str | None:
    """`check_golds` for one answer."""
    return check_golds([answer], kind, [choices])[0]


def is_plain(gold: str) -> bool:
    """Whether a gold needs no grammar: it is decided by reading against any answer that is written as plainly."""
    return gold.isalpha() or quick_verdict("0", gold) is not None


def check_timeout(timeout_s: Any) -> None:
    """Nothing if it is a positive number of seconds.

    Raises:
        UserError: If not.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise UserError(f"reward_timeout_s must be a positive number of seconds; received {timeout_s!r}")


def reason_rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of each reason, as the metrics `reward_workers/right`, `reward_workers/timeout`, ..."""
    counts = Counter(item.reason for item in verdicts)
    return {f"reward_workers/{reason.replace(' ', '_')}": counts[reason] / max(1, len(verdicts)) for reason in REASONS}


def _key(completion: str, gold: Any, kind: str, choices: Sequence[str] | None) -> Any:
    """What decides a verdict: `(answer, gold, kind, choices)`, or the verdict itself if there is nothing to compare."""
    try:
        parsed_gold = None if gold is None else parse_gold(gold, kind)
    except UserError:
        parse_gold("0", kind)  # an unknown kind is the caller's mistake, not the row's
        parsed_gold = None
    answer = find_answer(completion, kind, choices)
    if parsed_gold is None:
        return verdict(None, answer, "unparsable")
    if answer is None:
        return verdict(False, None, "no answer")
    return answer, parsed_gold, kind, None if choices is None else tuple(choices)


def _from_reply(answer: str, reply: dict[str, Any]) -> Verdict:
    if reply.get("failure") == "timeout":
        return verdict(False, answer, "timeout")
    if reply.get("failure") == "crashed":
        return verdict(None, answer, "crashed")
    if "error" in reply:
        return verdict(None if reply["error"] == "gold" else False, answer, "unparsable")
    return verdict(reply["correct"], answer)

"""What servers do to a run: lose connections, hang, lie, come back with old weights. Faults come from a fake server."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rollout.fake_server import FakeServer

from r1v_rl.errors import RecipeError, UserError
from r1v_rl.grpo.policy import check_versions
from r1v_rl.rollout import weight_files
from r1v_rl.rollout.dispatch import Dispatch
from r1v_rl.rollout.server_client import ServerClient
from r1v_rl.rollout.server_keeper import Server, ServerKeeper, Weights
from r1v_rl.rollout.server_side import GENERATE, WeightFiles, _tensors
from r1v_rl.rollout.servers import ServerSettings, check_address, check_settings
from r1v_rl.rollout.vllm_server import start_server
from r1v_rl.rollout.weight_files import WeightFolder
from r1v_rl.types import Completion

OPTIONS = {"dtype": "float32", "logprobs_mode": "raw_logprobs", "max_model_len": 200}
WEIGHTS = Weights("run", 3, 7, ("/frozen",), ("/trained",))


@pytest.fixture
def servers():
    """Makes fake servers that hold the present weights, and stops them."""
    made: list[FakeServer] = []

    def make(*wrongs):
        for wrong in wrongs:
            server = FakeServer() if wrong is None else FakeServer(wrong)
            server.held = WEIGHTS.version
            made.append(server)
        return made

    yield make
    for server in made:
        server.stop()


def once(what):
    """The first completion goes wrong."""
    return lambda path, number: what if path == GENERATE and number == 0 else None


def always(what, *paths):
    return lambda path, number: what if path in paths or not paths else None


def ask(
    servers: list[FakeServer],
    count: int = 6,
    *,
    timeout_s: float = 1.0,
    patience_s: float | None = None,
    on_reply=None,
):
    """Replies to `count` prompts of two completions each, and how often one had to be asked for again."""

    async def asked():
        clients = [ServerClient(server.url, "key", timeout_s) for server in servers]
        limits = {"timeout_s": timeout_s, "patience_s": patience_s or timeout_s}
        dispatch = Dispatch(clients, WEIGHTS.version, first=0, watch=lambda: None, **limits)
        bodies = [{"token_ids": [1, 2, i], "sampling_params": {"n": 2}} for i in range(count)]
        try:
            return await dispatch.all(bodies, [f"row{i}" for i in range(count)], on_reply), dispatch.retries
        finally:
            for client in clients:
                await client.close()

    return asyncio.run(asked())


def test_each_reply_is_told_of_once_and_a_mistake_in_it_ends_the_call(servers):
    told = []
    replies, retries = ask(servers(once("half"), None), on_reply=lambda *reply: told.append(reply))
    assert retries == 1 and [reply for _, reply in sorted(told, key=lambda one: one[0])] == replies

    def refuse(number, reply):
        raise UserError("the prompt was read otherwise")

    with pytest.raises(UserError, match="read otherwise"):
        ask(servers(), on_reply=refuse)


def completions_of(server: FakeServer) -> int:
    return sum(path.startswith(GENERATE) for path in server.seen)


def test_prompts_are_spread_by_load_and_come_back_in_order(servers):
    replies, retries = ask(servers(None, None, None), 9)
    assert [reply.prompt_ids for reply in replies] == [[1, 2, i] for i in range(9)] and not retries
    assert all(len(reply.samples) == 2 and reply.weight_version == WEIGHTS.version for reply in replies)
    assert [completions_of(server) for server in servers()] == [3, 3, 3]


@pytest.mark.parametrize("wrong", [500, 503, "half", "not json", '{"choices": []}', "stale"], ids=str)
def test_a_reply_that_does_not_count_is_asked_for_again(servers, wrong):
    replies, retries = ask(servers(once(wrong)), 3)
    assert len(replies) == 3 and retries == 1
    assert all(reply.weight_version == WEIGHTS.version for reply in replies)


def test_a_server_with_other_weights_is_not_asked(servers):
    first, second = servers(None, None)
    first.held = "default"
    replies, _ = ask([first, second])
    assert len(replies) == 6 and completions_of(first) == 0


def test_what_a_hanging_server_had_in_hand_goes_to_the_other(servers):
    """It accepts, says that it holds the weights, and never gets further."""
    started = time.monotonic()
    replies, _ = ask(servers(always("hang", GENERATE), None), timeout_s=2.0)
    assert len(replies) == 6 and time.monotonic() - started < 8


@pytest.mark.parametrize("paths", [(), (GENERATE,)], ids=["never answers", "never completes"])
def test_one_that_accepts_and_never_answers_is_an_error_within_the_limit(servers, paths):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no rollout server is left after 2 s \(`rollout_timeout_s`\): http://127"):
        ask(servers(always("hang", *paths)), timeout_s=2.0)
    assert time.monotonic() - started < 8


def test_a_slow_server_is_waited_for_while_it_gets_further(servers):
    """Longer than the limit, which counts from the last token."""
    (server,) = servers(always(4.0, GENERATE))

    def work():
        while server.tokens < 1000:
            server.tokens += 1
            time.sleep(0.1)

    import threading

    threading.Thread(target=work, daemon=True).start()
    replies, retries = ask([server], 1, timeout_s=1.5)
    assert len(replies) == 1 and not retries


def test_a_prompt_that_fails_everywhere_ends_the_run_by_its_row(servers, monkeypatch):
    monkeypatch.setattr("r1v_rl.rollout.dispatch._TRIES", 2)
    with pytest.raises(UserError, match=r"row row0: no rollout server could answer it, .*status 500"):
        ask(servers(always(500, GENERATE)), 1)


def test_a_server_that_hangs_again_and_again_over_a_prompt_is_not_asked_for_ever(servers):
    """One that says it holds the weights each time, and would be waited for long."""
    with pytest.raises(UserError, match=r"row row0: no rollout server could answer it, .*no progress for 0\.5 s"):
        ask(servers(always("hang", GENERATE)), 1, timeout_s=0.5, patience_s=100.0)


def test_a_refused_key_is_a_mistake_and_not_retried(servers):
    with pytest.raises(UserError, match="refuses the key: set VLLM_API_KEY"):
        ask(servers(always(401, GENERATE)), 1)
    assert completions_of(servers()[0]) == 1


def test_completions_of_unknown_or_older_weights_are_never_trained_on():
    for version in (None, 6, 8):
        with pytest.raises(RuntimeError, match=rf"weights of step .*{version}.*, not 7"):
            check_versions([[Completion([1], [0.0], "", False, 7)], [Completion([1], [0.0], "", False, version)]], 7)
    check_versions([[Completion([1], [0.0], "", False, 7)]], 7)


# ---- enough before all ----------------------------------------------------------------------------------------------


def first(servers: list[FakeServer], count: int, needed: int) -> tuple[list, int, float]:
    """Replies to `count` prompts of three completions when `needed` are there, how often one was asked for again, and
    the seconds that it took."""

    async def asked():
        clients = [ServerClient(server.url, "key", 1.0) for server in servers]
        dispatch = Dispatch(clients, WEIGHTS.version, first=0, watch=lambda: None, timeout_s=30.0, patience_s=30.0)
        sampling = {"n": 3}
        bodies = [{"token_ids": [1, 2, i], "sampling_params": sampling, "request_id": f"r{i}"} for i in range(count)]
        try:
            started = time.monotonic()
            replies = await dispatch.first(bodies, ["row"] * count, lambda answered: len(answered) >= needed)
            return replies, dispatch.retries, time.monotonic() - started
        finally:
            for client in clients:
                await client.close()

    return asyncio.run(asked())


def slow(*numbers):
    """Those prompts take half a minute."""
    return lambda body: 30.0 if body["token_ids"][-1] in numbers else 0.0


def test_what_is_not_waited_for_is_stopped_and_comes_back_in_part(servers):
    for server in servers(None, None):
        server.seconds = slow(1, 4)
    replies, retries, seconds = first(servers(), 6, 4)
    assert seconds < 6 and not retries
    assert [reply.stopped for reply in replies] == [[False, i in (1, 4), i in (1, 4)] for i in range(6)]
    assert [[len(ids) for ids, _ in reply.samples] for reply in (replies[1], replies[4])] == [[2, 1, 1]] * 2
    assert sum(path == "/abort_requests" for server in servers() for path in server.seen) >= 2


def test_a_server_that_does_not_stop_is_left_with_its_connection(servers, monkeypatch):
    monkeypatch.setattr("r1v_rl.rollout.dispatch._STOP_S", 0.5)
    for server in servers(always("hang", "/abort_requests"), None):
        server.seconds = slow(0, 1)
    replies, _, seconds = first(servers(), 4, 2)
    assert seconds < 8 and [reply is None for reply in replies] in (
        [True, False, *[False] * 2],
        [False, True, *[False] * 2],
    )


def test_what_no_server_has_room_for_is_not_begun(servers, monkeypatch):
    monkeypatch.setattr("r1v_rl.rollout.dispatch._AT_ONCE", 6)
    (server,) = servers(None)
    server.seconds = slow(1)
    replies, _, _ = first([server], 4, 1)
    assert replies[0].stopped == [False] * 3 and replies[1].stopped == [False, True, True]
    assert {body["token_ids"][-1] for body in server.bodies} == {0, 1} and replies[2:] == [None, None]


def test_completions_that_ended_unasked_are_asked_for_again(servers):
    """As when somebody else stops a server's requests."""
    (server,) = servers(None)
    for name in ("r0", "r1"):
        server._stopped[f"generate-tokens-{name}"].set()
    answer, aborted = server._completions, server._stopped

    def once_in_part(body):
        found = answer(body)
        aborted[f"generate-tokens-{body['request_id']}"].clear()
        return found

    server._completions = once_in_part
    replies, retries, _ = first([server], 2, 2)
    assert retries == 2 and [reply.stopped for reply in replies] == [[False] * 3] * 2


# ---- the keeper -----------------------------------------------------------------------------------------------------


def keeper_of(servers, **changes):
    limits = {"timeout_s": 2.0, "start_timeout_s": 2.0, **changes}
    check = changes.pop("check", lambda url, found: check_settings(OPTIONS, url, found))
    return ServerKeeper([Server(server.url) for server in servers], "key", check=check, **limits)


def test_weights_reach_every_server_whole_and_then_what_trains(servers):
    loaded: list = []
    (server,) = servers(None)
    answer = server.answer
    server.answer = lambda path, body: (
        loaded.append(body) or answer(path, body) if "rpc" in path else answer(path, body)
    )
    server.held = "default"
    keeper = keeper_of([server])
    keeper.hold(WEIGHTS)
    assert server.held == "run:3"
    keeper.hold(Weights("run", 4, 8, ("/frozen",), ("/next",)))
    assert server.held == "run:4"
    keeper.close()
    assert [body["kwargs"]["paths"] for body in loaded] == [["/frozen", "/trained"], ["/next"]]
    resets = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    steps = [path for path in server.seen if path not in ("/weight_info", "/server_info")]
    assert steps == ["/update_weight_version", "/collective_rpc", *resets, "/update_weight_version"] * 2


def test_a_server_that_comes_back_gets_the_weights_before_it_is_asked(servers):
    first, second = servers(None, None)
    keeper = keeper_of([first, second])
    keeper.hold(WEIGHTS)
    first.stop()
    assert len(ask([first, second])[0]) == 6 and completions_of(first) == 0
    keeper.hold(Weights("run", 4, 8, ("/frozen",), ("/next",)))  # does not wait for one that is gone
    keeper.hold(WEIGHTS)
    first.start()
    until = time.monotonic() + 10
    while first.held != WEIGHTS.version and time.monotonic() < until:
        time.sleep(0.1)
    keeper.close()
    ask([first, second])
    assert completions_of(first) == 3
    assert all(path.endswith(WEIGHTS.version) for path in first.seen if path.startswith(GENERATE))


def test_files_stay_while_a_server_reads_them(servers):
    """One that is late with step 7, as a restarted one is, when step 8 is handed over."""
    slow, other = servers(lambda path, number: 1.5 if path == "/collective_rpc" and number == 0 else None, None)
    slow.held = other.held = "default"
    keeper = keeper_of([slow, other])
    keeper._weights = WEIGHTS
    while keeper.servers[1].holds != WEIGHTS.version:
        time.sleep(0.05)
    keeper._weights = Weights("run", 4, 8, ("/frozen",), ("/next",))
    assert keeper.files_in_use() == {"/frozen", "/trained", "/next"}
    keeper.hold(keeper._weights)
    assert keeper.files_in_use() == {"/frozen", "/next"} and slow.held == other.held == "run:4"
    keeper.close()


def test_a_server_that_does_not_see_the_files_says_so(servers):
    (server,) = servers(lambda path, number: '{"results": [["/frozen"]]}' if path == "/collective_rpc" else None)
    server.held = "default"
    keeper = keeper_of([server])
    with pytest.raises(UserError, match=r"does not see /frozen \(`weight_sync_dir`\)"):
        keeper.hold(WEIGHTS)
    keeper.close()
    assert server.held == "loading" and WeightFiles().load_weight_files(["/nowhere"]) == ["/nowhere"]


@pytest.mark.parametrize(("wrong", "message"), [("hang", "no answer"), (None, "nothing answers there")], ids=str)
def test_no_server_at_the_start_is_an_error_within_the_limit(servers, wrong, message):
    (server,) = servers(always(wrong))
    if wrong is None:
        server.stop()
    keeper = keeper_of([server])
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"no rollout server answers: {server.url}: .*{message}.*`rollout_timeout_s`"):
        keeper.hold(WEIGHTS)
    assert time.monotonic() - started < 8
    keeper.close()
    if wrong is None:
        server.start()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "torch.bfloat16"}, "dtype torch.bfloat16, the run needs torch.float32: .*`--dtype`"),
        ({"logprobs_mode": "processed_logprobs"}, "needs raw_logprobs: .*`--temperature`"),
        ({"max_model_len": 100}, "holds 100 tokens, the run needs 200.*`--vllm_max_model_length 200`"),
    ],
)
def test_a_server_that_is_not_what_the_run_needs_is_refused(servers, changes, message):
    (server,) = servers(None)
    server.settings |= changes
    keeper = keeper_of([server])
    with pytest.raises(UserError, match=message):
        keeper.hold(WEIGHTS)
    keeper.close()


# ---- addresses, processes, files ------------------------------------------------------------------------------------


def test_another_machine_needs_a_token(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    check_address("http://127.0.0.1:8000")
    for url, message in [
        ("http://10.0.0.1:8000", r"another machine \(10.0.0.1\): set the environment variable VLLM_API_KEY"),
        ("http://me:secret@localhost:8000", "must hold no password"),
        ("localhost:8000", "must be like http://HOST:PORT"),
        ("http://localhost:8000/v1", "must be like http://HOST:PORT"),
    ]:
        with pytest.raises(RecipeError, match=message) as raised:
            ServerSettings(urls=[url])
        assert "secret" not in str(raised.value)
    monkeypatch.setenv("VLLM_API_KEY", "a key of some length")
    check_address("http://10.0.0.1:8000")


def test_no_server_takes_weights_or_is_reachable_without_a_key():
    with pytest.raises(RecipeError, match="takes weights needs a key"):
        start_server("model", ["policy"], {}, port=1, takes_weights=True)
    with pytest.raises(RecipeError, match=r"other machines \(`host` 0\.0\.0\.0\) needs a key"):
        start_server("model", ["policy"], {}, port=1, host="0.0.0.0")


def test_weight_files_hold_what_they_should_and_go(tmp_path, monkeypatch):
    dead = tmp_path / "r1v-rl-weights-999999999-x"
    dead.mkdir()
    (tmp_path / "r1v-rl-weights-1-x").mkdir()  # of a process that lives
    monkeypatch.setattr(weight_files, "_BUCKET_BYTES", 100)
    folder = WeightFolder(str(tmp_path))
    assert not dead.exists() and len(list(tmp_path.iterdir())) == 2
    assert folder.path.stat().st_mode & 0o077 == 0
    tied = torch.arange(20.0)
    weights = {"embedding": tied, "middle": torch.ones(3, 5)[:, :2], "head": tied}
    files = folder.write(weights.items(), "trained-0")
    assert len(files) == 2 and all(Path(file).parent == folder.path for file in files)
    read = dict(_tensors(files))
    assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)
    monkeypatch.setattr(weight_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"GB more: set `weight_sync_dir`"):
        folder.write(weights.items(), "trained-1")
    folder.keep(files[1:])
    assert [str(path) for path in folder.path.iterdir()] == files[1:]
    folder.remove()
    assert not folder.path.exists()

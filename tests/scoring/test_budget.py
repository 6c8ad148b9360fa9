"""A budget of tokens and of dollars is not passed, whatever is in flight; calls count as they are sent."""

import json

import pytest
from scoring.chat_server import chat_server

from r1v_rl.scoring.budget import Budget, BudgetReached
from r1v_rl.scoring.chat_model import EXTRA_TOKENS, ChatModel, ChatQuestion
from r1v_rl.scoring.replies import ReplyStore, Spent

PROMPT, REPLY = 40, 60
"""Tokens that the endpoint reports for each request."""
MOST = 100 + EXTRA_TOKENS + 10
"""What a request of ten bytes and at most 100 tokens of reply may take."""


def body(_text, _tries):
    return json.dumps(
        {
            "id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
            "usage": {"prompt_tokens": PROMPT, "completion_tokens": REPLY, "total_tokens": PROMPT + REPLY},
        }
    ).encode()  # fmt: skip


def ask(server, folder, budget, count=20):
    """What the replies took."""
    model = ChatModel("m", server.base_url, concurrency=4, parameters={"max_completion_tokens": 100})
    questions = [ChatQuestion(str(i), f"number {i:03d}") for i in range(count)]
    with ReplyStore(folder / "replies.jsonl") as store:
        try:
            model.ask(questions, store, label="asking", budget=budget)
        finally:
            spent = store.spent.get("m", Spent())
    return spent


def test_the_tokens_of_replies_are_kept(tmp_path):
    with chat_server(body) as server:
        assert ask(server, tmp_path, None) == Spent(20, 20 * PROMPT, 20 * REPLY)
    with ReplyStore(tmp_path / "replies.jsonl") as store:
        assert store.spent == {"m": Spent(20, 20 * PROMPT, 20 * REPLY)}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"tokens": 1000}, 9),  # the tenth could take 174, and 900 are spent
        ({"tokens": MOST - 1}, 0),
        ({"usd": 0.01, "prices": {"m": (100.0, 100.0)}}, None),
    ],
)
def test_a_limit_is_not_passed_and_not_stopped_at_early(tmp_path, limits, expected):
    """$100 for a million tokens: a cent is 100 tokens, which no request of at most 174 may begin."""
    with chat_server(body) as server:
        with pytest.raises(BudgetReached, match="raise the limit"):
            ask(server, tmp_path, Budget(**limits))
        assert server.asked.total() == (expected or 0)
        with pytest.raises(BudgetReached):
            ask(server, tmp_path, Budget(**limits))  # what the folder has spent counts
        assert server.asked.total() == (expected or 0)


def test_retries_count_as_calls(tmp_path):
    with chat_server(lambda *_: 500) as server:
        with pytest.raises(BudgetReached):
            ask(server, tmp_path, Budget(calls=3))
        assert server.asked.total() == 3


def test_replies_in_flight_are_kept_when_the_budget_ends(tmp_path):
    """Four at once: the fifth call is refused, and all four replies are there."""
    with chat_server(body) as server:
        with pytest.raises(BudgetReached):
            ask(server, tmp_path, Budget(calls=4))
        assert server.asked.total() == 4
    with ReplyStore(tmp_path / "replies.jsonl") as store:
        assert len(store) == 4

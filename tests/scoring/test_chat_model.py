"""A chat model is asked once for each question, whatever its server does and whenever the process is killed."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from scoring.chat_server import chat_server

from r1v_rl.errors import RecipeError, UserError
from r1v_rl.scoring.chat_model import MAX_FAILURES_IN_A_ROW, ChatModel, ChatQuestion
from r1v_rl.scoring.replies import ReplyStore

QUESTIONS = [ChatQuestion(str(i), f"question {i}") for i in range(40)]


def model(server, **settings) -> ChatModel:
    return ChatModel("judge", server.base_url, **{"timeout_s": 5.0, "max_retries": 3, **settings})


def ask(server, folder: Path, questions=QUESTIONS, **settings):
    with ReplyStore(folder / "replies.jsonl") as store:
        return model(server, **settings).ask(questions, store, label="test")


def test_every_question_is_asked_once_and_replies_keep_their_order(tmp_path):
    with chat_server(lambda text, tries: time.sleep(0.01 * (hash(text) % 3)) or f"re: {text}") as server:
        replies = ask(server, tmp_path, concurrency=8)
        again = ask(server, tmp_path, concurrency=1)
    assert [reply.text for reply in replies] == [f"re: {question.text}" for question in QUESTIONS]
    assert again == replies
    assert set(server.asked.values()) == {1} and len(server.asked) == 40
    assert 2 <= server.most_in_flight <= 8


def test_equal_questions_are_asked_once(tmp_path):
    with chat_server(lambda text, tries: "yes") as server:
        replies = ask(server, tmp_path, [ChatQuestion("a", "same"), ChatQuestion("b", "same")])
    assert [reply.text for reply in replies] == ["yes", "yes"] and server.asked == {"same": 1}


@pytest.mark.parametrize(
    "fault", [500, 503, 429, (429, {"Retry-After": "0.2"}), b"<html>oops</html>", b'{"choices": []}', b"", 1.5]
)
def test_a_fault_is_asked_again_until_it_passes(tmp_path, fault):
    with chat_server(lambda text, tries: fault if tries == 1 and text != "question 3" else "Score: 4") as server:
        replies = ask(server, tmp_path, QUESTIONS[:6], concurrency=6, timeout_s=0.7)
    assert [reply.text for reply in replies] == ["Score: 4"] * 6
    assert server.asked["question 3"] == 1 and server.asked["question 0"] == 2


def test_a_question_that_always_fails_is_named_and_the_rest_are_answered(tmp_path):
    with chat_server(lambda text, tries: 400 if text == "question 2" else "Score: 4") as server:
        replies = ask(server, tmp_path, QUESTIONS[:5], concurrency=1)
        assert replies[2].text is None and "BadRequestError" in replies[2].error
        assert [reply.text for i, reply in enumerate(replies) if i != 2] == ["Score: 4"] * 4
        ask(server, tmp_path, QUESTIONS[:5])
    assert server.asked == {"question 2": 2, **{f"question {i}": 1 for i in (0, 1, 3, 4)}}


def test_a_dead_server_ends_the_run_and_the_replies_stay(tmp_path):
    with chat_server(lambda text, tries: "fine" if int(text.split()[1]) < 10 else 500) as server:
        with pytest.raises(UserError, match=f"failed {MAX_FAILURES_IN_A_ROW} times in a row.*10 replies are kept"):
            ask(server, tmp_path, concurrency=2, max_retries=0)
        server.answer = lambda text, tries: "fine"
        assert {reply.text for reply in ask(server, tmp_path)} == {"fine"}
    assert all(server.asked[f"question {i}"] == 1 for i in range(10))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_the_run_at_once(tmp_path, status):
    with chat_server(lambda text, tries: status) as server, pytest.raises(UserError, match="judge_base_url"):
        ask(server, tmp_path, concurrency=1)
    assert sum(server.asked.values()) == 1


def test_a_spent_quota_ends_the_run(tmp_path):
    body = json.dumps({"error": {"message": "spent", "code": "insufficient_quota"}}).encode()

    def answer(text, tries):
        return 429, {"x": "y"}

    with chat_server(answer) as server:
        server._server.RequestHandlerClass._send = lambda self, reply, text: _respond(self, 429, body)
        with pytest.raises(UserError, match="quota is spent"):
            ask(server, tmp_path, concurrency=1, max_retries=0)


def _respond(handler, status, body):
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_pictures_are_sent_and_belong_to_the_key(tmp_path):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    with chat_server(lambda text, tries: f"try {tries}") as server:
        pictures = [ChatQuestion("a", "q", (red,)), ChatQuestion("b", "q", (blue,)), ChatQuestion("c", "q")]
        replies = ask(server, tmp_path, pictures, concurrency=1)
    assert [reply.text for reply in replies] == ["try 1", "try 2", "try 3"]
    block = server.requests[0]["messages"][0]["content"][0]
    assert block["image_url"]["url"].startswith("data:image/png;base64,")


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "canary-1234567890")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server(lambda text, tries: "x") as server:
        ask(server, tmp_path, QUESTIONS[:1], api_key_env="MY_KEY")
        ask(server, tmp_path, QUESTIONS[1:2])
    assert server.keys == ["Bearer canary-1234567890", "Bearer none"]
    assert "canary" not in (tmp_path / "replies.jsonl").read_text()
    with pytest.raises(RecipeError, match="OPENAI_API_KEY"):
        ChatModel("gpt-4o")


def test_parameters_are_sent_and_a_wrong_one_is_the_users_mistake(tmp_path):
    with chat_server(lambda text, tries: "x") as server:
        ask(server, tmp_path, QUESTIONS[:1], parameters={"temperature": 0.5, "max_tokens": 7})
        assert server.requests[0]["temperature"] == 0.5 and server.requests[0]["max_tokens"] == 7
        with pytest.raises(RecipeError, match="judge_kwargs"):
            ask(server, tmp_path, QUESTIONS[1:2], parameters={"temprature": 0.5})
        with pytest.raises(RecipeError, match="must not set messages"):
            model(server, parameters={"messages": []})


# --- the store ------------------------------------------------------------------------------------------------------


def test_a_cut_line_is_removed_and_a_foreign_one_passed_over(tmp_path):
    path = tmp_path / "replies.jsonl"
    with ReplyStore(path) as store:
        store.put(("a", "1"))
    with open(path, "a") as file:
        file.write('nonsense\n{"key": "b", "val')
    with ReplyStore(path) as store:
        assert store.get("a") == "1" and store.get("b") is None
        store.put(("c", "3"))
    with ReplyStore(path) as store:
        assert store.get("c") == "3" and len(store) == 2


def test_a_second_process_is_refused(tmp_path):
    with ReplyStore(tmp_path / "replies.jsonl"), pytest.raises(UserError, match="in use by another process"):
        ReplyStore(tmp_path / "replies.jsonl")


# --- kills ----------------------------------------------------------------------------------------------------------


def asking(base_url: str, folder: str, fault: str, concurrency: int) -> None:
    os.environ["R1V_FAULT"] = fault
    with ReplyStore(Path(folder, "replies.jsonl")) as store:
        ChatModel("judge", base_url, concurrency=concurrency).ask(QUESTIONS, store, label="test")


def killed(server, folder: Path, fault: str, concurrency: int, after_s: float | None = None) -> int:
    process = multiprocessing.get_context("spawn").Process(
        target=asking, args=(server.base_url, str(folder), fault, concurrency)
    )
    process.start()
    if after_s is not None:
        while not server.answered:
            time.sleep(0.005)
        time.sleep(after_s)
        process.kill()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("number", [1, 2, 3, 4, 61])
def test_killed_while_a_reply_is_written_nothing_on_the_disk_is_asked_again(tmp_path, number):
    """A reply passes four points: before its line, in the middle of it, after it, and when the disk has it."""
    with chat_server(lambda text, tries: f"re: {text}") as server:
        assert killed(server, tmp_path, f"reply_write:{number}", 1) == -9
        replies = ask(server, tmp_path)
    assert [reply.text for reply in replies] == [f"re: {question.text}" for question in QUESTIONS]
    repeated = [text for text, count in server.asked.items() if count > 1]
    written = number % 4 in (3, 0)
    assert repeated == ([] if written else [f"question {number // 4}"]), "only the one that was not written yet"


def test_killed_at_any_moment_only_what_was_in_flight_is_asked_again(tmp_path):
    concurrency = 4
    for run, after_s in enumerate((0.0, 0.03, 0.08, 0.15)):
        folder = tmp_path / str(run)
        with chat_server(lambda text, tries: time.sleep(0.02) or f"re: {text}") as server:
            killed(server, folder, "", concurrency, after_s)
            replies = ask(server, folder, concurrency=concurrency)
        assert [reply.text for reply in replies] == [f"re: {question.text}" for question in QUESTIONS]
        assert sum(server.asked.values()) - len(QUESTIONS) <= concurrency

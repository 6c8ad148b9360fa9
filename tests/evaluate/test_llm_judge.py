"""The judge of answers that the rules cannot read: what it is asked, what it is shown, what its word changes."""

from scoring.chat_server import chat_server

from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.evaluate.accuracy import Answered, judge_responses
from r1v_rl.evaluate.llm_judge import judge_unread
from r1v_rl.scoring.chat_model import ChatModel
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.types import Completion

SAID = [
    "<think>6 or 7</think>It could be the sixth or the seventh, and I think that the former is what was meant.",
    "<think>7</think>\\boxed{7}",
    "<think>6</think>\\boxed{6}",
    "<think>so I think that",
    "<think>secret</think>Certainly it is half a dozen, which anybody who has counted them will be able to confirm.",
]


def test_only_what_is_unread_is_asked_and_thoughts_stay_hidden(tmp_path):
    rows = [{"id": str(i), "problem": "How many?", "answer": "6"} for i in range(len(SAID))]
    examples = examples_from_rows(rows)
    verdicts = judge_responses(examples, SAID, answer_kind="number", timeout_s=10.0)
    assert [v.reason for v in verdicts] == ["no answer", "wrong", "right", "no answer", "no answer"]
    completion = Completion([1], [0.0], "", False)
    answered = [Answered(e, completion, v, text) for e, v, text in zip(examples, verdicts, SAID, strict=True)]
    with chat_server(lambda text, tries: "Same: yes" if "half a dozen" in text else "I cannot tell.") as server:
        judge = ChatModel("j", server.base_url, max_retries=0)
        with ReplyStore(tmp_path / "replies.jsonl") as store:
            found = judge_unread(judge, store, answered)
        assert len(server.asked) == 2 and not any("secret" in text for text in server.asked)
        assert all("Reference answer: 6" in text for text in server.asked)
        with ReplyStore(tmp_path / "replies.jsonl") as store:
            assert judge_unread(judge, store, answered) == found
        assert sum(server.asked.values()) == 2  # replies are kept
    assert [row.verdict.correct for row in found] == [False, False, True, False, True]
    assert [row.judged_by for row in found] == ["rules"] * 4 + ["llm"]


def test_an_option_is_shown_with_its_text(tmp_path):
    row = {"id": "1", "problem": "Which?", "answer": "B", "choices": ["red", "blue"], "answer_kind": "choice"}
    (example,) = examples_from_rows([row])
    text = "<think>.</think>Neither of these colours is quite the one that is meant, but azure comes close to it."
    (verdict,) = judge_responses([example], [text], answer_kind="choice", timeout_s=10.0)
    answered = Answered(example, Completion([1], [0.0], "", False), verdict, text)
    with chat_server(lambda text, tries: "Same: yes") as server, ReplyStore(tmp_path / "r.jsonl") as store:
        (found,) = judge_unread(ChatModel("j", server.base_url), store, [answered])
        assert "Reference answer: B. blue" in next(iter(server.asked))
    assert found.verdict.correct is True and found.judged_by == "llm"

"""An assessment is read in full, or it is no assessment."""

import json
import math

import pytest

from r1v_rl.distill.prompts import SUB_SCORES, SubScore, assessment_schema, read_assessment, read_json

GOOD = {name: {"reason": f"because {name}", "score": i} for i, name in enumerate(SUB_SCORES)}


def reply(**changes):
    return json.dumps(GOOD | changes)


def test_sub_scores_and_reasons_are_read():
    found = read_assessment(reply())
    assert found["quality"] == SubScore(0.0, "because quality")
    assert found["reasoning_demand"] == SubScore(0.4, "because reasoning_demand")


@pytest.mark.parametrize("wrapped", ["```json\n{}\n```", "<think>hm {{</think>\n{}", " {} "])
def test_fences_and_thoughts_around_it(wrapped):
    assert read_assessment(wrapped.replace("{}", reply()).replace("{{", "{")) == read_assessment(reply())


def test_a_tag_inside_a_reason_is_text():
    text = reply(quality={"reason": "it says </think> itself", "score": 5})
    assert read_assessment(text)["quality"].value == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (reply()[:-20], "no JSON"),
        ("I am sorry, I cannot help with that.", "no JSON"),
        ("[1, 2]", "no JSON object"),
        (reply(necessity={"reason": "x", "score": 6}), "`necessity.score` is 6"),
        (reply(necessity={"reason": "x", "score": -1}), "-1"),
        (reply(necessity={"reason": "x", "score": 2.5}), "2.5"),
        (reply(necessity={"reason": "x", "score": True}), "no number"),
        (reply(necessity={"reason": "x", "score": math.nan}), "no number"),
        (reply(necessity=3), "no object `necessity`"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "integration"}), "no object `integration`"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_anything_else_is_a_problem_in_words(text, expected):
    assert expected in read_assessment(text)


def test_the_schema_asks_for_what_is_read():
    schema = assessment_schema()["json_schema"]["schema"]
    assert schema["required"] == list(SUB_SCORES) and schema["properties"]["quality"]["required"] == ["reason", "score"]
    assert read_json('{"a": 1}') == {"a": 1}

"""The rule-based integration score orders questions as the paper's patterns do."""

from r1v_rl.distill.integration import integration_by_rules

IDENTIFY = "What is the animal in the picture?"
WHERE = "Where is the red ball?"
RELATE = "Which of the two triangles is larger, the one left of the circle or the one between both squares?"
EXPLAIN = "Why does the current in the circuit stop when the resistor next to the lamp is removed?"


def scored(text, num_images=1):
    return integration_by_rules(text, num_images).score


def test_identification_is_low_relations_higher_explanation_highest():
    assert scored(IDENTIFY) < 0.3 and scored(WHERE) < 0.3
    assert scored(IDENTIFY) < scored(RELATE) and scored(WHERE) < scored(RELATE)
    assert scored(EXPLAIN) > 0.7


def test_how_many_is_no_explanation():
    assert scored("How many circles are there?") < 0.5
    assert scored("How many circles are there?") < scored("How do the circles differ, given that both are red?")


def test_the_reason_names_the_patterns():
    assert "why or how: why" in integration_by_rules(EXPLAIN, 1).reason
    assert "identification: what is" in integration_by_rules(IDENTIFY, 1).reason


def test_pictures_count():
    assert scored(IDENTIFY, 3) > scored(IDENTIFY, 1)


def test_bounds():
    assert 0.0 <= scored("What is what is? Where are, which is, who is, is there, name the") <= 1.0
    assert scored(" ".join([EXPLAIN, RELATE, "angle radius area explain prove because if"]), 4) <= 1.0

"""A reward in EasyR1's signature, to copy and edit.

    reward_funcs: [rewards/easyr1_style.py:compute_score]

`compute_score` gets a list of `{response, response_length, ground_truth}` and returns a list of dicts: `overall` is the
reward, the other entries are logged as `reward_parts/<name>` and in the completions table.
"""

from r1v_rl.scoring import judge_answers
from r1v_rl.scoring.format import has_format

REWARD_NAME = "accuracy_and_format"
REWARD_TYPE = "batch"  # "sequential": one dict in, one dict out
FORMAT_WEIGHT = 0.1


def compute_score(reward_inputs):
    """Mostly the right answer, a little for the format: no wrong answer earns more than a right one."""
    responses = [item["response"] for item in reward_inputs]
    verdicts = judge_answers(responses, [item["ground_truth"] for item in reward_inputs])
    scores = []
    for response, verdict in zip(responses, verdicts, strict=True):
        accuracy, well_formed = float(verdict.correct or 0), float(has_format(response))
        overall = (1 - FORMAT_WEIGHT) * accuracy + FORMAT_WEIGHT * well_formed
        shown = None if verdict.correct is None else overall
        scores.append({"overall": shown, "accuracy": accuracy, "format": well_formed})
    return scores

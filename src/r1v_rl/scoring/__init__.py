"""Rewards and the judge of answers. Importing this package imports neither torch nor sympy."""

from r1v_rl.scoring.answers import Verdict, parse_gold
from r1v_rl.scoring.loader import RewardFunction, load_rewards
from r1v_rl.scoring.workers import GraderPool, check_gold, check_golds, judge_answer, judge_answers

__all__ = [
    "GraderPool",
    "RewardFunction",
    "Verdict",
    "check_gold",
    "check_golds",
    "judge_answer",
    "judge_answers",
    "load_rewards",
    "parse_gold",
]

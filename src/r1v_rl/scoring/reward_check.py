"""`r1v-rl reward-check`: what rewards give for the right answer, and for those that must not earn as much."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from r1v_rl.config import DataConfig, build_configs, read_recipe
from r1v_rl.data.dataset import load_configured_examples
from r1v_rl.errors import RecipeError
from r1v_rl.scoring.loader import load_rewards
from r1v_rl.scoring.rescore_main import RewardKeys

_THINK = "<think>\nWe look at the question and work it out step by step.\n</think>\n\n"
_STRICT = ("accuracy", "judge")
"""Rewards that must give 1 for the gold and 0 for everything else."""
_EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "math": [{"answer": "5"}, {"answer": r"\frac{3}{4}"}, {"answer": "x^2+1"}],
    "number": [{"answer": "5"}, {"answer": "0.75"}],
    "choice": [{"answer": "B", "choices": ["red", "blue", "green", "black"]}],
    "text": [{"answer": "blue"}],
}


@dataclass
class RewardCheckConfig(RewardKeys):
    """What `r1v-rl reward-check` tries."""

    num_rows: int = field(default=4, metadata={"help": "Rows of the dataset to take; without one, a few of its own."})


@dataclass(frozen=True, slots=True)
class Case:
    """One completion to a row."""

    name: str
    completion: str
    is_right: bool = False


def cases_of(question: str, gold: str, choices: Sequence[str] | None) -> list[Case]:
    """The completions that a reward is tried with."""
    wrong = _wrong(gold, choices)
    options = [chr(ord("A") + i) for i in range(len(choices))] if choices else [wrong, gold, "0", "1"]
    return [
        Case("gold", rf"{_THINK}The answer is \boxed{{{gold}}}.", is_right=True),
        Case("empty", ""),
        Case("echoed prompt", question),
        Case("wrong answer", rf"{_THINK}The answer is \boxed{{{wrong}}}."),
        Case("all options in one box", rf"{_THINK}The answer is \boxed{{{', '.join(options)}}}."),
        Case("several boxes", _THINK + ", ".join(rf"\boxed{{{option}}}" for option in options)),
        Case("gold, then another", rf"{_THINK}\boxed{{{gold}}}. No, wait: \boxed{{{wrong}}}."),
        Case("box in the reasoning", rf"<think>\nSo it is \boxed{{{gold}}}.\n</think>\n\nI cannot say."),
        Case("reasoning never closed", rf"<think>\nSo it is \boxed{{{gold}}}."),
        Case("empty box", _THINK + r"The answer is \boxed{}."),
        Case("chain of equals", rf"{_THINK}The answer is \boxed{{{wrong}={gold}}}."),
        Case("tags without an answer", "<think></think>" * 3),
        Case("gold in prose", f"{_THINK}Somebody said {gold}, but others did not think so at all, and I cannot say."),
    ]


def _wrong(gold: str, choices: Sequence[str] | None) -> str:
    if choices:
        return "A" if gold.strip() not in ("A", str(choices[0])) else "B"
    if gold == "blue":
        return "red"
    if not any(char.isdigit() for char in gold):
        return "nothing of the kind"
    return "-" + next((digit for digit in "7391" if digit not in gold), "2") * 4


def main(argv: Sequence[str]) -> int:
    """Exit code 0 where the gold earns most everywhere, 2 where a reward can be had without it."""
    values = read_recipe((RewardCheckConfig, DataConfig), argv, prog="r1v-rl reward-check")
    config, data = build_configs((RewardCheckConfig, DataConfig), values)
    weights = config.weights()
    functions = load_rewards(config.reward_funcs, config)
    rows = _rows(config, data)
    faults: list[str] = []
    for row in rows:
        cases = cases_of(row["question"], row["answer"], row.get("choices"))
        parts = [function(**_arguments(row, cases, config)) for function in functions]
        names = [function.name for function in functions]
        sums = [sum(w * (p[i] or 0.0) for w, p in zip(weights, parts, strict=True)) for i in range(len(cases))]
        print(f"\nrow {row['id']}, gold {row['answer'][:60]!r}")
        print(f"  {'completion':<26}" + "".join(f"{name[:18]:>20}" for name in names) + f"{'sum':>10}")
        for i, case in enumerate(cases):
            found = _faults(case, {n: p[i] for n, p in zip(names, parts, strict=True)}, sums[i], sums[0])
            faults += [f"row {row['id']}, {case.name}: {fault}" for fault in found]
            shown = "".join(f"{'-' if p[i] is None else format(p[i], '.3f'):>20}" for p in parts)
            print(f"  {case.name:<26}{shown}{sums[i]:>10.3f}{'   <-- ' + '; '.join(found) if found else ''}")
    for function in functions:
        function.close()
    print(f"\n{len(faults)} faults in {len(rows)} rows" + "".join(f"\n  {fault}" for fault in faults))
    return 2 if faults else 0


def _faults(case: Case, rewards: dict[str, float | None], total: float, gold_total: float) -> list[str]:
    found = []
    for name, reward in rewards.items():
        if name in _STRICT and case.is_right and reward != 1.0:
            found.append(f"{name} must give 1, gives {reward}")
        if name in _STRICT and not case.is_right and reward is not None and reward > 0:
            found.append(f"{name} must give 0, gives {reward}")
    if not case.is_right and total >= gold_total:
        found.append(f"earns {total:.3f}, no less than the gold's {gold_total:.3f}")
    return found


def _rows(config: RewardCheckConfig, data: DataConfig) -> list[dict[str, Any]]:
    if data.dataset_name is None:
        own = _EXAMPLES.get(config.answer_kind)
        if own is None:
            raise RecipeError(f"answer_kind must be one of {', '.join(_EXAMPLES)}; received {config.answer_kind!r}")
        return [{"id": f"own-{i}", "question": "What is the result?", **row} for i, row in enumerate(own)]
    examples = load_configured_examples(data)
    rows = []
    for index in range(min(config.num_rows, len(examples))):
        example = examples[index]
        if example.answer is None:
            continue
        blocks = [block for message in example.messages for block in message["content"]]
        question = "\n".join(block["text"] for block in blocks if block["type"] == "text")
        rows.append({**example.columns, "id": example.id, "question": question, "answer": example.answer})
    if not rows:
        raise RecipeError("reward-check needs rows with a gold answer; the first ones of the dataset have none")
    return rows


def _arguments(row: dict[str, Any], cases: Sequence[Case], config: RewardCheckConfig) -> dict[str, Any]:
    texts = [case.completion for case in cases]
    if config.prompt_opens_think:
        texts = [text.removeprefix("<think>\n") for text in texts]
    columns = {name: [value] * len(cases) for name, value in row.items() if name not in ("question", "completion")}
    return {
        **columns,
        "prompts": [[{"role": "user", "content": row["question"]}]] * len(cases),
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(text.encode()) for text in texts],
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }

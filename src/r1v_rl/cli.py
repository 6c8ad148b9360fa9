"""The command line: `r1v-rl COMMAND ...`, and what its exit code means."""

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from r1v_rl.errors import RankError, UserError

EXIT_OK, EXIT_FAULT, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
"""1 is Python's own: a fault of ours, with its traceback."""


@dataclass(frozen=True)
class Command:
    """A subcommand; its module is imported when it is called, so that help needs none of them."""

    target: str
    """`module:function`; the function takes the arguments after the command's name and returns an exit code."""
    summary: str


COMMANDS: Mapping[str, Command] = {
    "compose": Command("r1v_rl.assembly:compose_main", "join a vision encoder and a language model by a new projector"),
    "align": Command("r1v_rl.sft.main:align", "train the projector between a vision encoder and a language model"),
    "transfer": Command(
        "r1v_rl.assembly:transfer_main", "move a trained projector to another language model of the same hidden size"
    ),
    "sft": Command("r1v_rl.sft.main:main", "fine-tune a vision-language model on target texts, any parts of it"),
    "distill": Command(
        "r1v_rl.distill.main:main", "make reasoning chains of fitting length: score, generate, judge, revise, export"
    ),
    "iterate": Command(
        "r1v_rl.sft.iterate.main:main", "iterative fine-tuning: answer, judge, score, select and train, round by round"
    ),
    "grpo": Command("r1v_rl.grpo.main:main", "train a vision-language model with GRPO"),
    "run": Command("r1v_rl.chain.main:main", "run a chain of stages from its file, or go on where it stopped"),
    "evaluate": Command("r1v_rl.evaluate.main:main", "measure a model on benchmarks or held-out rows"),
    "chat": Command("r1v_rl.chat.main:main", "ask a model about pictures: once, in a conversation, or as a server"),
    "convert": Command("r1v_rl.assembly:convert_main", "between internvl_chat (Skywork R1V) and transformers' layout"),
    "check": Command(
        "r1v_rl.check.main:main", "find what is wrong with a recipe before it runs: keys, data, images, rewards"
    ),
    "plan": Command(
        "r1v_rl.plan.main:main", "memory of each device and FLOPs of a step for a recipe, without loading weights"
    ),
    "judge": Command(
        "r1v_rl.scoring.judge_main:main",
        "grade a jsonl of `gold` and `completion` with the accuracy reward's own judge",
    ),
    "reward-check": Command(
        "r1v_rl.scoring.reward_check:main", "run rewards against gold, empty, echoed and gaming answers"
    ),
    "rescore": Command("r1v_rl.scoring.rescore_main:main", "apply other rewards to the stored rollouts of a run"),
    "report": Command("r1v_rl.tracking.report:main", "one HTML page for a run's folder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 on success, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return EXIT_OK if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        print(f"r1v-rl {version('r1v-rl')}")
        return EXIT_OK
    name = arguments.pop(0)
    try:
        return _load(name)(arguments) or EXIT_OK
    except UserError as error:
        print(f"r1v-rl {name}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RankError:  # it has been said
        return EXIT_FAULT
    except KeyboardInterrupt:
        print(f"r1v-rl {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _load(name: str) -> Callable[[list[str]], int | None]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise UserError(f"there is no such command; there are {', '.join(COMMANDS)}.{hint}")
    module, _, function = COMMANDS[name].target.partition(":")
    return getattr(importlib.import_module(module), function)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: r1v-rl COMMAND [--config RECIPE.yaml] [--key value ...]",
            "",
            "commands:",
            *lines,
            "",
            "`r1v-rl COMMAND --help` lists a command's keys. Values on the command line override the recipe.",
        ]
    )

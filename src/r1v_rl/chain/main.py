"""`r1v-rl run`: a chain of stages from its file, continued where it stopped."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from r1v_rl.chain.recipe import Chain, arguments, read_chain
from r1v_rl.chain.runner import Runner, StageFailed
from r1v_rl.errors import RecipeError
from r1v_rl.recipe_values import scalar

_EPILOG = """
A chain file sets `output_dir`, `seed` (of every stage), `evaluate` (a recipe of `r1v-rl evaluate`, for every stage's
model) and `stages`, a list of

  name: align                            the stage's folder in output_dir
  command: align                         compose, align, transfer, distill (leaves no model), sft, iterate or grpo
  config: align.yaml                     its recipe, beside the chain file
  from: {compose: model_name_or_path}    earlier stage -> the recipe key that takes its folder, or
                                         {iterate: {dataset_name: selection.parquet}} for a file inside
  overrides: {max_steps: 100}            recipe keys that the chain sets
  accelerate: ../accelerate/zero3.yaml   run by `accelerate launch --config_file`
  evaluate: false                        no evaluation, or folders that hold models: [round-*/model, .]
  evaluate_with: {instruction: Explain.} keys of `evaluate` that are other ones for this stage

A stage that is done is skipped while its recipe, its parents' manifests and the files that the recipe names are what
they were; otherwise it runs again and its old folder is kept beside it. A stage that was interrupted goes on. The table
of stages stands in output_dir/stages.md and stages.json. Ctrl-C stops the present stage with a checkpoint.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; `r1v-rl run --help` shows what there is")


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when every stage is done, 128 + N after signal N, else that of the stage that failed."""
    options, overrides = parse_arguments(argv)
    chain = read_chain(Path(options.config), output_dir=options.output_dir, seed=options.seed, overrides=overrides)
    until = chain.stages.index(chain.stage(options.until)) + 1 if options.until else len(chain.stages)
    runner = Runner(chain)
    if options.dry_run:
        _show_plan(runner, until)
        return 0
    plans = runner.plans(chain.stages[:until])
    if not options.no_check and any(plan.action != "skip" for plan in plans):
        code = subprocess.call([sys.executable, "-m", "r1v_rl", "check", "run", *_forwarded(chain, options, overrides)])
        if code:
            return code
    try:
        return runner.run(chain.stages[:until])
    except StageFailed as failed:
        print(f"r1v-rl run: error: {failed}; the same command goes on from there", file=sys.stderr)
        return failed.code


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """The options, and `--STAGE.key value` by stage."""
    parser = _Parser(
        prog="r1v-rl run",
        usage="%(prog)s CHAIN.yaml [--seed N] [--output_dir DIR] [--until STAGE] [--dry-run] [--STAGE.key value ...]",
        description="Run a chain of stages, each fed by the one before, and print the table of what they reached.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("chain", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--config", help="the chain file, where it is not named first")
    parser.add_argument("--seed", type=int, help="seed of every stage, instead of the recipes' own")
    parser.add_argument("--output_dir", "--output-dir", help="instead of the chain file's")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--no-check", "--no_check", action="store_true", help="start without `r1v-rl check`")
    dotted, rest = _split_off_overrides(list(argv))
    options = parser.parse_args(rest)
    if (options.chain is None) == (options.config is None):
        raise RecipeError("run needs one chain file: `r1v-rl run CHAIN.yaml`, or `--config CHAIN.yaml`")
    options.config = options.config or options.chain
    return options, dotted


def _split_off_overrides(words: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`--grpo.max_steps 5` and `--grpo.max_steps=5`; several values make a list."""
    overrides: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    values: list[str] | None = None
    for word in words:
        name, has_value, value = word.partition("=")
        if word.startswith("--") and "." in name:
            stage, _, key = name[2:].partition(".")
            values = [value] if has_value else []
            overrides.setdefault(stage, {})[key] = values
        elif word.startswith("--"):
            values = None
            rest.append(word)
        elif values is not None:
            values.append(word)
        else:
            rest.append(word)
    for stage, keys in overrides.items():
        for key, given in keys.items():
            if not given:
                raise RecipeError(f"--{stage}.{key} must be followed by a value")
            keys[key] = scalar(given[0]) if len(given) == 1 else [scalar(word) for word in given]
    return overrides, rest


def _forwarded(chain: Chain, options: argparse.Namespace, overrides: dict[str, dict[str, Any]]) -> list[str]:
    """The command line again, for `check`."""
    words = ["--config", str(chain.path), "--output_dir", str(chain.output_dir)]
    words += ["--seed", str(options.seed)] if options.seed is not None else []
    words += ["--until", options.until] if options.until else []
    named = {f"{stage}.{key}": value for stage, keys in overrides.items() for key, value in keys.items()}
    return words + arguments(named)


def _show_plan(runner: Runner, until: int) -> None:
    for plan in runner.plans(runner.chain.stages[:until]):
        print(f"{plan.action:<8}{plan}")
        print(f"        {shlex.join(runner.command(plan.stage))}")

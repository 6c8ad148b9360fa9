"""`r1v-rl check`: what is wrong with a recipe, said before it runs."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from r1v_rl.chain.main import parse_arguments
from r1v_rl.chain.recipe import read_chain
from r1v_rl.chain.runner import Runner
from r1v_rl.check import stages
from r1v_rl.check.conformance import ConformanceConfig, check_model
from r1v_rl.check.launch import launch_file
from r1v_rl.check.report import Place, Report
from r1v_rl.config import checked_values, parse_recipe, read_recipe
from r1v_rl.errors import RecipeError, UserError

CHECKS: Mapping[str, Callable[[dict[str, Any], Report], None]] = {
    "compose": stages.check_compose,
    "align": stages.check_align,
    "transfer": stages.check_transfer,
    "sft": stages.check_sft,
    "distill": stages.check_distill,
    "iterate": stages.check_iterate,
    "grpo": stages.check_grpo,
    "evaluate": stages.check_evaluate,
}
_HELP = f"""usage: r1v-rl check [COMMAND] --config RECIPE.yaml [--missing_ok] [--key value ...]
       r1v-rl check model --model_name_or_path FOLDER [--use_vllm false] [--dtype bfloat16]

Finds what is wrong with a recipe without loading weights or training: keys, references, data, images, prompt lengths,
batch arithmetic, rewards. COMMAND is {", ".join(CHECKS)} or run; left out, it is the one that the
recipe's first line shows (`# r1v-rl grpo --config ...`), or run for a file with `stages`. A file of `accelerate launch`
is read by accelerate itself.

`check model` loads a model and runs made-up prompts (text only, one picture, three) in every way that training and
rollout do: padded, with a shared prompt, by vLLM; all must agree with its own forward, and pictures must matter.

  --missing_ok   the recipe is for another machine: models, data and accelerators that are not here are listed as
                 "not checked here" instead of being faults

Exit code 0 where the recipe can run, 2 with every fault that was found.
"""


def main(argv: Sequence[str]) -> int:
    """0 where the recipe can run; raises `UserError` with every fault that was found."""
    words = list(argv)
    if "-h" in words or "--help" in words:
        print(_HELP, end="")
        return 0
    flags = ("--missing_ok", "--missing-ok")
    missing_ok = any(word in flags for word in words)
    words = [word for word in words if word not in flags]
    command = words.pop(0) if words and not words[0].startswith("-") else None
    command = command or command_of(_config_path(words))
    if command == "run":
        return _check_chain(words, missing_ok)
    if command == "launch":
        print(launch_file(_config_path(words)))
        return 0
    if command == "model":
        (config,) = parse_recipe((ConformanceConfig,), words, prog="r1v-rl check model")
        report = Report()
        check_model(config, report)
        report.finish()
        return 0
    if command not in CHECKS:
        raise RecipeError(f"check knows recipes of {', '.join(CHECKS)} and run, and model, received {command!r}")
    report = Report(Place(missing_ok))
    values = read_recipe(stages.CONFIGS[command], words, prog=f"r1v-rl check {command}")
    CHECKS[command](values, report)
    report.finish()
    return 0


def command_of(recipe: Path) -> str:
    """The command that a recipe is for: `run` where it has stages, `launch` for a file of `accelerate launch`, else the
    one that its first line shows.

    Raises:
        RecipeError: If it shows none.
    """
    try:
        lines = recipe.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise RecipeError(f"--config must name a YAML file, received {recipe}, which cannot be read") from None
    if any(line.startswith("stages:") for line in lines):
        return "run"
    if any(line.startswith("distributed_type:") for line in lines):
        return "launch"
    for first, second in pairwise(lines[0].split() if lines else []):
        if first in ("r1v-rl", "r1v_rl") and second in CHECKS:
            return second
    raise RecipeError(
        f"{recipe} does not say which command it is for: name it, as in `r1v-rl check grpo --config {recipe}`, or "
        f"begin the file with the line `# r1v-rl grpo --config {recipe}`"
    )


def _config_path(words: Sequence[str]) -> Path:
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            return Path(words[i + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    raise RecipeError("check needs the recipe: `r1v-rl check [COMMAND] --config RECIPE.yaml`")


def _check_chain(words: Sequence[str], missing_ok: bool) -> int:
    """Every stage with what the chain sets in it; folders that earlier stages make are not looked into."""
    options, overrides = parse_arguments(words)
    chain = read_chain(Path(options.config), output_dir=options.output_dir, seed=options.seed, overrides=overrides)
    until = chain.stages.index(chain.stage(options.until)) + 1 if options.until else len(chain.stages)
    faults: list[str] = []
    made: dict[Path, str] = {}
    for plan in Runner(chain).plans(chain.stages[:until]):
        stage = plan.stage
        if plan.action == "skip":
            print(f"{stage.name} is done")
        else:
            print(f"{stage.name} ({stage.command}, {stage.config})")
            _look_at(
                stage.command, stage.values(), Report(Place(missing_ok, dict(made)), f"stage {stage.name}: ", faults)
            )
            made[stage.folder] = stage.name
    if chain.evaluate is not None:
        print("evaluate")
        values = {**chain.evaluate, "model_name_or_path": str(chain.stages[0].folder)}
        _look_at("evaluate", values, Report(Place(missing_ok, made), "evaluate: ", faults))
        for stage in filter(lambda stage: stage.evaluate_with, chain.stages[:until]):
            _look_at(
                "evaluate",
                {**values, **stage.evaluate_with},
                Report(Place(missing_ok, made), f"stage {stage.name}: ", faults),
            )
    Report(faults=faults).finish()
    return 0


def _look_at(command: str, given: dict[str, Any], report: Report) -> None:
    """A recipe's check, its own refusal reported beside those of the others."""
    values = report.look("keys", lambda: (f"{len(given)} set", checked_values(stages.CONFIGS[command], given)))
    if values is None:
        return
    try:
        CHECKS[command](values, report)
    except UserError as error:
        report.faults.append(f"{report.prefix}{error}")
        print("  recipe    FAULT", flush=True)

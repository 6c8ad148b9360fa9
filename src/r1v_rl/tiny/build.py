"""Trains the tiny parts and writes them with checksums and log: `python -m r1v_rl.tiny.build --out DIR [--part P]`.

About an hour on two cores. The parts are shipped, so nobody has to run it; it is how they were made.
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from r1v_rl.models.weight_files import load_weights
from r1v_rl.tiny.encoder import train_encoder
from r1v_rl.tiny.language import (
    fresh_language_model,
    reasoning_report,
    save_language_model,
    substitute_report,
    train_language_model,
)
from r1v_rl.tiny.lessons import REASONING_MIX, SUBSTITUTE_MIX
from r1v_rl.tiny.parts import ASSETS, write_checksums
from r1v_rl.tiny.tokenizer import DIRECT_TEMPLATE, REASONING_TEMPLATE

logger = logging.getLogger(__name__)
STEPS = {"encoder": 1600, "substitute": 3500, "reasoning": 600}


def build_encoder(out: Path, steps: int, seed: int) -> None:
    accuracy = train_encoder(out / "vision_encoder", steps=steps, seed=seed)
    logger.info("vision encoder: held-out accuracy %s", accuracy)


def build_substitute(out: Path, steps: int, seed: int) -> None:
    def report(model: Qwen2ForCausalLM) -> dict:
        save_language_model(model, out / "substitute_llm", DIRECT_TEMPLATE)
        return substitute_report(model)

    model = fresh_language_model(seed)
    train_language_model(model, SUBSTITUTE_MIX, steps=steps, lr=2.5e-3, seed=seed, name="substitute", report=report)


def build_reasoning(out: Path, steps: int, seed: int) -> None:
    def report(model: Qwen2ForCausalLM) -> dict:
        save_language_model(model, out / "reasoning_llm", REASONING_TEMPLATE)
        return reasoning_report(model)

    model = load_weights(Qwen2ForCausalLM, out / "substitute_llm", dtype="float32")
    train_language_model(
        model, REASONING_MIX, steps=steps, lr=2e-3, seed=seed + 1, name="reasoning", easy=0.0, report=report
    )


BUILDERS = {"encoder": build_encoder, "substitute": build_substitute, "reasoning": build_reasoning}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r1v_rl.tiny.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the parts (default: the shipped ones)")
    parser.add_argument("--part", choices=BUILDERS, action="append", help="one part; default: all three, in order")
    parser.add_argument("--steps", type=int, help="training steps of each part named (default: its own)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    log = logging.FileHandler(args.out / "build.log.txt")
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", handlers=[log, logging.StreamHandler()])
    torch.set_flush_denormal(True)
    for part in args.part or BUILDERS:
        started = time.monotonic()
        steps = args.steps or STEPS[part]
        logger.info("build %s: %d steps, seed %d, %d threads", part, steps, args.seed, torch.get_num_threads())
        BUILDERS[part](args.out, steps, args.seed)
        logger.info("build %s: done in %.0f s", part, time.monotonic() - started)
    write_checksums(args.out)


if __name__ == "__main__":
    main()

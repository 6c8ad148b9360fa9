"""The first half of a round: the model of the last round answers every row, and its answers are judged, part by part.

It runs in a process of its own, so that the engine's memory is free when training begins. A part that is on the disk is
never made again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from r1v_rl.data.chat import check_prompt_lengths, load_processor
from r1v_rl.data.dataset import load_configured_examples
from r1v_rl.durable import fault_point, replacing
from r1v_rl.rollout.engine import RolloutEngine, Sampling
from r1v_rl.rollout.prompts import EncodedPrompt, prompt_encoder
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.scoring.replies import ReplyStore
from r1v_rl.sft.iterate.config import Recipe, build_recipe
from r1v_rl.sft.iterate.judge import AnswerJudge
from r1v_rl.types import Completion, Example

PART_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("opens_think", pa.bool_()),
        ("completion", pa.string()),
        ("num_tokens", pa.int64()),
        ("is_truncated", pa.bool_()),
        ("correct", pa.bool_()),
        ("parsed_answer", pa.string()),
        ("verdict", pa.string()),
        ("judge_problem", pa.string()),
        ("resampled", pa.string()),
        ("num_resamples", pa.int64()),
    ]
)


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def missing_parts(folder: Path, num_rows: int, batch_size: int) -> list[int]:
    """Numbers of the parts that are yet to be made."""
    return [n for n in range(-(-num_rows // batch_size)) if not part_path(folder, n).exists()]


def read_parts(folder: Path, num_rows: int, batch_size: int) -> list[dict[str, Any]]:
    """One record a row of the dataset, in its order."""
    paths = [part_path(folder, n) for n in range(-(-num_rows // batch_size))]
    return [record for path in paths for record in pq.ParquetFile(path).read().to_pylist()]


def answer_rows(values: dict[str, Any], model: str, round_number: int, folder: Path, store_path: Path) -> None:
    """Make every part of a round that is missing.

    Args:
        values: The recipe.
        model: Folder or hub id of the model that answers.
        folder: Where the parts go.
        store_path: The judges' replies.
    """
    recipe = build_recipe(values)
    iterate, seed = recipe.iterate, recipe.training.seed
    examples = load_configured_examples(recipe.data, seed=seed)
    processor = load_processor(model, recipe.data.max_image_tiles)
    longest = check_prompt_lengths(
        examples,
        processor,
        max_model_len=AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings,
        max_completion_length=iterate.max_completion_length,
        template_kwargs=recipe.template_kwargs,
    )
    size = iterate.generation_batch_size
    missing = missing_parts(folder, len(examples), size)
    vllm = {
        "seed": seed,
        "gpu_memory_utilization": iterate.vllm_gpu_memory_utilization,
        "kv_cache_memory_bytes": iterate.vllm_kv_cache_memory_bytes,
        "tensor_parallel_size": iterate.vllm_tensor_parallel_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (
        ReplyStore(store_path) as store,
        standalone_engine(
            model,
            processor,
            use_vllm=iterate.use_vllm,
            dtype=recipe.dtype,
            max_model_len=longest + iterate.max_completion_length,
            max_images=max(len(example.images) for example in examples),
            **vllm,
        ) as engine,
        tqdm(total=len(examples), desc=f"round {round_number}: answering", disable=None, unit="row") as bar,
    ):
        bar.update(len(examples) - sum(len(examples[n * size : (n + 1) * size]) for n in missing))
        answerer = Answerer(engine, processor, recipe, store)
        for number in missing:
            rows = examples[number * size : (number + 1) * size]
            records = answerer.answer(rows, f"{seed}-{round_number}-{number}")
            with replacing(part_path(folder, number)) as aside:
                pq.write_table(pa.Table.from_pylist(records, schema=PART_SCHEMA), aside)
            fault_point("part_written")
            bar.update(len(rows))


class Answerer:
    """Answers rows, judges the answers, and tries again where they are wrong and nobody else will mend them."""

    def __init__(self, engine: RolloutEngine, processor: Any, recipe: Recipe, store: ReplyStore):
        self._engine, self._config = engine, recipe.iterate
        self._encode = prompt_encoder(
            processor,
            device="cuda" if torch.cuda.is_available() else "cpu",
            with_vision_inputs=not self._config.use_vllm,
            template_kwargs=recipe.template_kwargs,
        )
        self._judge = AnswerJudge(recipe, store)
        self._num_resamples = self._config.num_resamples if recipe.scorers.reviser() is None else 0

    def answer(self, examples: Sequence[Example], seed: str) -> list[dict[str, Any]]:
        """One record of `PART_SCHEMA` a row; `seed` decides what is sampled."""
        config = self._config
        prompts = [self._encode(example) for example in examples]
        opens = [prompt_opens_think(prompt.text) for prompt in prompts]
        first = config.sampling()
        completions = [group[0] for group in self._engine.generate(prompts, first, seed=_number(seed))]
        verdicts, problems = self._judge(examples, [c.text for c in completions], opens)
        records = [
            {
                "id": example.id,
                "opens_think": opened,
                "completion": completion.text,
                "num_tokens": len(completion.token_ids),
                "is_truncated": completion.is_truncated,
                "correct": verdict.correct,
                "parsed_answer": verdict.answer,
                "verdict": verdict.reason,
                "judge_problem": problem,
                "resampled": None,
                "num_resamples": 0,
            }
            for example, opened, completion, verdict, problem in zip(
                examples, opens, completions, verdicts, problems, strict=True
            )
        ]
        needy = [i for i, record in enumerate(records) if needs_chain(record)]
        if needy and self._num_resamples:
            found = self._resample([prompts[i] for i in needy], [opens[i] for i in needy], first, seed)
            for i, text in zip(needy, found, strict=True):
                records[i] |= {"resampled": text, "num_resamples": self._num_resamples}
        return records

    def _resample(
        self, prompts: list[EncodedPrompt], opens: list[bool], sampling: Sampling, seed: str
    ) -> list[str | None]:
        """The first right and finished one of a few tries at each prompt, None where none is."""
        tries = self._num_resamples
        again = replace(sampling, num_generations=tries, temperature=self._config.resample_temperature, top_p=1.0)
        groups = self._engine.generate(prompts, again, seed=_number(f"{seed}-again"))
        verdicts, _ = self._judge(
            [prompt.example for prompt in prompts for _ in range(tries)],
            [completion.text for group in groups for completion in group],
            [opened for opened in opens for _ in range(tries)],
        )
        right = [verdict.correct is True for verdict in verdicts]
        return [_first_right(group, right[i * tries : (i + 1) * tries]) for i, group in enumerate(groups)]


def needs_chain(record: dict[str, Any]) -> bool:
    """Whether the model's own answer cannot be trained on: it is wrong, or right and cut off."""
    return record["correct"] is False or (record["correct"] is True and record["is_truncated"])


def _first_right(group: Sequence[Completion], right: Sequence[bool]) -> str | None:
    return next((c.text for c, is_right in zip(group, right, strict=True) if is_right and not c.is_truncated), None)


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") >> 1

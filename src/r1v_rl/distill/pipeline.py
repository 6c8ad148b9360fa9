"""The steps of a distillation, in order. Each reads what is kept and asks only for what is missing."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from r1v_rl.data.chat import check_prompt_lengths, load_processor, prompt_text
from r1v_rl.data.contamination import find_duplicates, find_overlaps
from r1v_rl.data.dataset import heldout_examples, load_configured_examples, rows_sha256
from r1v_rl.data.export import example_schema
from r1v_rl.distill import assess
from r1v_rl.distill.config import DistillConfig, Recipe
from r1v_rl.distill.generate import EndpointGenerator, EngineLimits, Generator, ModelGenerator, Request
from r1v_rl.distill.length import Scores, repetition_penalty, scaled_scores, token_budget, weighted_score
from r1v_rl.distill.records import EXPORTED, Row
from r1v_rl.distill.revise import Selection
from r1v_rl.errors import UserError
from r1v_rl.evaluate.tested_rows import tested_rows
from r1v_rl.rollout.vllm_server import vllm_server
from r1v_rl.scoring.budget import Budget
from r1v_rl.scoring.format import prompt_opens_think
from r1v_rl.scoring.replies import REPLIES, ReplyStore
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.types import Example

SERVER_LOG = "server.log"


@dataclass(frozen=True)
class Source:
    """What is distilled: rows, checked, and the processor of the model that writes and is trained."""

    rows: list[Row]
    processor: Any
    longest_prompt: int
    data_hash: str

    @property
    def included(self) -> list[Row]:
        return [row for row in self.rows if not row.excluded]


def read_source(recipe: Recipe) -> Source:
    """Everything that can be wrong with the rows is said here; duplicates and evaluation rows are marked.

    Raises:
        UserError: Naming the row that cannot be used, or where no row is left.
    """
    config = recipe.distill
    examples = load_configured_examples(recipe.data, seed=config.seed)
    example_schema(examples, EXPORTED)
    processor = load_processor(config.model_name_or_path, recipe.data.max_image_tiles)
    text_config = AutoConfig.from_pretrained(str(config.model_name_or_path)).get_text_config()
    longest = check_prompt_lengths(
        examples,
        processor,
        max_model_len=text_config.max_position_embeddings,
        max_completion_length=config.max_completion_length,
        template_kwargs=recipe.template_kwargs,
    )
    excluded = _excluded(recipe, examples)
    opens = [prompt_opens_think(prompt_text(processor, example, recipe.template_kwargs)) for example in examples]
    rows = [Row(example, opens[index], excluded.get(index, "")) for index, example in enumerate(examples)]
    if len(excluded) == len(rows):
        raise UserError(f"none of {len(rows)} rows is left: row {examples[0].id} is {excluded[0]}")
    return Source(rows, processor, longest, rows_sha256(examples))


def _excluded(recipe: Recipe, examples: Sequence[Example]) -> dict[int, str]:
    """Index of a row -> why nothing is paid for it."""
    found: dict[int, str] = {}
    if recipe.distill.duplicate_share:
        for later, first in find_duplicates(examples, min_share=recipe.distill.duplicate_share, progress=False):
            found[later] = f"a duplicate of row {examples[first].id}"
    heldout = heldout_examples(recipe.heldout, recipe.data, recipe.distill.seed)
    if tested := tested_rows(heldout, recipe.data):
        position = {example.id: index for index, example in enumerate(examples)}
        for overlap in find_overlaps(examples, tested, progress=False):
            found[position[overlap.train_id]] = f"evaluation row {overlap.test_id} ({overlap.kind})"
    return found


class Distillation:
    """One run over a source. Servers and engines start when they are first needed, and end with `stack`."""

    def __init__(self, recipe: Recipe, source: Source, store: ReplyStore, stack: ExitStack):
        self.source = source
        config = recipe.distill
        self.budget = Budget(config.budget_calls, config.budget_tokens, config.budget_usd, config.prices())
        if config.serve_model is not None:
            recipe = replace(recipe, distill=config.served_by(cache(lambda: _serve(config, stack))))
        self.recipe = recipe
        self._store = store
        self.generator = self._generator(stack)
        self._selection = Selection(recipe, source.processor, store, self.budget)

    def _generator(self, stack: ExitStack) -> Generator:
        config, processor = self.recipe.distill, self.source.processor
        if (model := config.generator()) is not None:
            return EndpointGenerator(self.recipe, model, processor, self._store, self.budget)
        longest = self.source.longest_prompt + config.max_completion_length
        limits = EngineLimits(longest, max(len(row.example.images) for row in self.source.rows))
        return ModelGenerator(self.recipe, processor, self._store, stack, limits)

    def run(self) -> None:
        """Fill in the source's rows.

        Raises:
            BudgetReached: Before the budget is passed.
        """
        rows, config = self.source.included, self.recipe.distill
        assess.measure(rows, self.source.processor)
        if config.necessity_by == "rules":
            assess.ablate_by_rules(rows)
        elif config.ablation:
            assess.ablate(rows, self.generator, self._selection.judge, config)
        if config.assessment == "judge":
            judge = config.judge()
            assert judge is not None  # the recipe's check
            assess.ask_judge(rows, judge, config, self._store, self.budget)
        assess.combine(rows)
        set_lengths(rows, config)
        groups = self.generator([self.request(row) for row in rows], config.sampling(), label="generating")
        for row, group in zip(rows, groups, strict=True):
            row.chains = [replace(chain) for chain in group]
        pairs = [(row.example, chain) for row in rows for chain in row.chains]
        self._selection.judge([example for example, _ in pairs], [chain for _, chain in pairs])
        self._selection.choose(rows)

    def request(self, row: Row) -> Request:
        """The row's chains, with its own penalty and budget."""
        config = self.recipe.distill
        limit = config.max_completion_length if row.token_budget is None else row.token_budget
        return Request(row.example, limit, row.penalty)


def set_lengths(rows: Sequence[Row], config: DistillConfig) -> None:
    """Each row's weighted score over the set, its penalty, and its budget where the recipe sets one (DRLC)."""
    scaled = scaled_scores([Scores(row.vision, row.text, row.integration) for row in rows])
    for row, scores in zip(rows, scaled, strict=True):
        row.score = weighted_score(scores, beta=config.beta, gamma=config.gamma)
        row.penalty = repetition_penalty(row.score, alpha=config.alpha)
        if config.token_budget is not None:
            low, high = config.token_budget
            row.token_budget = token_budget(row.score, (low, high))


def replies_path(config: DistillConfig) -> Path:
    """Where what was asked and generated is kept."""
    return Path(config.replies) if config.replies else Path(str(config.output_dir)) / REPLIES


def _serve(config: DistillConfig, stack: ExitStack) -> str:
    """The base URL of the run's own server."""
    names = [name for name in dict.fromkeys((config.judge_model, config.reviser_model)) if name]
    assert config.serve_model is not None and not isinstance(config.serve_kwargs, str)
    log = Path(str(config.output_dir)) / SERVER_LOG
    model = str(resolve_part(config.serve_model))
    server = vllm_server(model, names, config.serve_kwargs or {}, timeout_s=config.serve_timeout_s, log=log)
    return stack.enter_context(server)

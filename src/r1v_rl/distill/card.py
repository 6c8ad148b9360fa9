"""The data card: what the data set is, where it comes from, what was done to it, what was left out."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from r1v_rl.distill.config import Recipe
from r1v_rl.distill.records import Row
from r1v_rl.tracking.manifest import versions
from r1v_rl.tracking.redaction import redact

CARD = "README.md"
_MAX_REASONS = 12
_OWN_WORDS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+%")
"""What tells reasons of one kind apart."""


def data_card(rows: Sequence[Row], recipe: Recipe, provenance: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Markdown with the header that the Hugging Face hub reads."""
    config, data = recipe.distill, recipe.data
    kinds = Counter(_kind(row) for row in rows if row.kept is None)
    reasons = "\n".join(f"| {number} | {reason} |" for reason, number in kinds.most_common(_MAX_REASONS))
    models = {
        "chains by": provenance["generator"],
        "assessed by": config.judge_model if config.assessment == "judge" else "rules alone",
        "answers judged by": "rules" if config.answer_judge == "rules" else f"rules, then {config.judge_model}",
        "revised by": config.reviser_model or "nobody",
    }
    lines = [
        "---",
        "task_categories: [image-text-to-text, visual-question-answering]",
        "tags: [reasoning, chain-of-thought, distillation]",
        f"size_categories: [{_size(summary['kept'])}]",
        "---",
        "",
        "# Reasoning chains of adaptive length",
        "",
        f"{summary['kept']} of {summary['rows']} rows of `{data.dataset_name}`, each with a chain of thought whose "
        "final answer was judged right. Made with `r1v-rl distill` (AL-CoTD: Skywork R1V, arXiv 2504.05599, 2.3).",
        "",
        "| | |",
        "| --- | --- |",
        *[f"| {name} | {value} |" for name, value in models.items()],
        f"| weights (sha256) | {provenance['weights_sha256'] or 'unknown: behind an endpoint'} |",
        f"| prompts (sha256) | {provenance['prompts_sha256']} |",
        f"| seed | {provenance['seed']} |",
        f"| penalty | min(2, exp({config.alpha:.4g} (1 - (v + {config.beta:g} t + {config.gamma:g} i) / "
        f"{1 + config.beta + config.gamma:g}))), mean {summary['mean_penalty']} |",
        f"| token budget | {config.token_budget or 'none'} |",
        f"| sampling | {config.num_generations} chains a row, temperature {config.temperature:g}, top_p "
        f"{config.top_p:g}, at most {config.max_completion_length} tokens |",
        f"| evaluation set compared with | {recipe.heldout.eval_dataset_name or 'none'} |",
        f"| versions | {', '.join(f'{name} {number}' for name, number in versions().items() if number)} |",
        "",
        "## Columns",
        "",
        "The columns of the source, `completion` (the chain as it follows the prompt of the model above), and "
        "`distill`: the scores in [0, 1], `penalty`, `token_budget`, `num_tokens`, `source` (own, revised) and "
        "provenance. `rows.parquet` holds every row of the source with every chain and reason.",
        "",
        "## Counts",
        "",
        "```json",
        json.dumps(dict(summary), indent=1),
        "```",
        "",
        "## Left out",
        "",
        "| rows | why |",
        "| --- | --- |",
        reasons or "| 0 | |",
        "",
        "Licence and rights are those of the source and of the models above; check them before you share this.",
        "",
    ]
    return str(redact("\n".join(lines)))


def _kind(row: Row) -> str:
    """The reason of a row that was left out, without what is its own."""
    if row.excluded:
        return "a duplicate" if row.excluded.startswith("a duplicate") else "a row of the evaluation set"
    _, was_revised, why = row.reason.rpartition("; revision ")
    if not was_revised:
        return "no right chain, not revised"
    return f"no right chain, last revision: {_OWN_WORDS.sub('...', why.partition(': ')[2])}"


def _size(number: int) -> str:
    """The hub's size classes."""
    steps = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in steps if number < limit), "n>1M")

"""The tiny language models: the substitute learns from text lessons; the reasoning model is a fine-tune of it."""

import logging
import time
from collections import defaultdict
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from r1v_rl.data.scene_questions import CELLS, COLORS, DIGITS, SHAPES
from r1v_rl.tiny.lessons import lesson_batches, sample_lesson
from r1v_rl.tiny.optimizers import muon_and_adamw, step_all, warm_and_decay
from r1v_rl.tiny.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)


def language_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    """Four layers of width 128 with heads of 32, about a million parameters."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class CellEmbedding(nn.Module):
    """Word embeddings in which a written cell is the sum of its place, colour, shape and digit, with noise in training.

    A projector that can write these attributes can then write any cell; the noise leaves room for imprecision. One
    more vector, `faint`, may be added to all cells of a scene: it changes nothing that a cell says, and no word has it.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        cells, colors, shapes, digits = len(CELLS), len(COLORS), len(SHAPES), len(DIGITS)
        num_words = cells * (1 + colors * shapes * digits)
        firsts = accumulate((cells, 1, colors, shapes), initial=0)
        cell_0, empty, color_0, shape_0, digit_0 = firsts
        self.words = nn.Parameter(weight[:-num_words].clone())
        self.attributes = nn.Parameter(torch.randn(digit_0 + digits, weight.shape[1]) * weight.std())
        self.faint = nn.Parameter(torch.randn(weight.shape[1]) * weight.std())
        contents = [
            (empty,),
            *product(range(color_0, shape_0), range(shape_0, digit_0), range(digit_0, digit_0 + digits)),
        ]
        members = torch.zeros(num_words, len(self.attributes))
        for row, (cell, content) in enumerate(product(range(cell_0, cells), contents)):
            members[row, [cell, *content]] = 1
        self.members: Tensor
        self.register_buffer("members", members)

    def table(self) -> Tensor:
        """The whole embedding matrix, (V, D), cells written out as sums."""
        return torch.cat([self.words, self.members @ self.attributes])

    def forward(self, ids: Tensor, faintness: Tensor, noise: float = 0.0) -> Tensor:
        """Embeddings (B, T, D) of ids (B, T); `faintness` (B,) of each row's scene."""
        is_cell = (ids >= len(self.words)).unsqueeze(-1)
        embeds = nn.functional.embedding(ids, self.table()) + is_cell * faintness[:, None, None] * self.faint
        if noise:
            scale = noise * self.attributes.detach().pow(2).mean().sqrt()
            embeds = embeds + is_cell * scale * torch.randn_like(embeds)
        return embeds


def completion_loss(model: Qwen2ForCausalLM, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the completions' tokens; right padding needs no attention mask under a causal one."""
    hidden = model.model(inputs_embeds=embeds).last_hidden_state[:, :-1]
    target = mask[:, 1:]
    return nn.functional.cross_entropy(model.lm_head(hidden[target]), ids[:, 1:][target])


def train_language_model(
    model: Qwen2ForCausalLM,
    mix: dict[str, int],
    *,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = 48,
    noise: float = 0.3,
    easy: float = 0.2,
    name: str,
    report=None,
    report_every: int = 500,
) -> Qwen2ForCausalLM:
    """The same model, trained on a mix of lessons; cells stay sums of attributes where they were before."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    embedding = CellEmbedding(model.get_input_embeddings().weight.detach())
    _take_over_cells(embedding, model)
    model.get_input_embeddings().weight.requires_grad_(False)  # `embedding` stands for it
    optimizers = muon_and_adamw(model, model.model.layers, embedding, lr=lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, partial(warm_and_decay, steps=steps)) for o in optimizers]
    batches = lesson_batches(tokenizer, mix, seed=seed, batch_size=batch_size, easy=easy)
    model.train()
    started = time.monotonic()
    for step in (bar := tqdm(range(1, steps + 1), desc=name, mininterval=10)):
        ids, mask, faintness = next(batches)
        loss = completion_loss(model, embedding(ids, faintness, noise), ids, mask)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *embedding.parameters()], 1.0)
        step_all(optimizers, schedules)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if report and (step % report_every == 0 or step == steps):
            _write_table(embedding, model)
            model.eval()
            logger.info(
                "%s step %d (%.0f s), loss %.3f: %s", name, step, time.monotonic() - started, loss.item(), report(model)
            )
            model.train()
    _write_table(embedding, model)
    model.requires_grad_(True)
    return model.eval()


@torch.no_grad()
def _take_over_cells(embedding: CellEmbedding, model: Qwen2ForCausalLM) -> None:
    """Fits the attribute vectors to the cells that the model has, exactly where they are sums already."""
    cells = model.get_input_embeddings().weight[len(embedding.words) :]
    embedding.attributes.copy_(torch.linalg.pinv(embedding.members) @ cells)


@torch.no_grad()
def _write_table(embedding: CellEmbedding, model: Qwen2ForCausalLM) -> None:
    model.get_input_embeddings().weight.copy_(embedding.table())


def fresh_language_model(seed: int) -> Qwen2ForCausalLM:
    """An untrained model whose cells are sums of attributes."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(language_config(build_tokenizer()))
    _write_table(CellEmbedding(model.get_input_embeddings().weight.detach()), model)
    return model


@torch.no_grad()
def text_accuracy(
    model: Qwen2ForCausalLM, task: str, *, n: int, seed: int = 0, careful: bool | None = None, temperature: float = 0.0
) -> dict[str, float]:
    """Accuracy on held-out written scenes by question kind, and `all`: the whole completion for `describe` and
    `look_up`, the box for the others; `careful` opens the chain with the first word of that style."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    rng = Random(f"heldout-{seed}")
    lessons = [sample_lesson(task, rng, split="heldout", careful=careful) for _ in range(n)]
    opening = "" if careful is None else "Look" if careful else "About"
    prompts = tokenizer([x.prompt + opening for x in lessons], padding=True, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model.generate(**prompts, max_new_tokens=96, **sampling)[:, prompts["input_ids"].shape[1] :]
    hits: dict[str, list[bool]] = defaultdict(list)
    for lesson, text in zip(lessons, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
        if task in ("describe", "look_up"):
            hit = text == lesson.completion
        else:
            hit = text.endswith(f"\\boxed{{{lesson.answer}}}")
        hits["all"].append(hit)
        hits[lesson.kind].append(hit)
        if task == "think":
            hits["says_look"].append((opening + text).startswith("Look"))
    return {name: round(sum(h) / len(h), 3) for name, h in sorted(hits.items())}


def substitute_report(model: Qwen2ForCausalLM, n: int = 200) -> dict[str, dict[str, float]]:
    """Held-out text accuracy of everything that the substitute is taught."""
    return {task: text_accuracy(model, task, n=n) for task in ("describe", "look_up", "explain", "direct")}


def reasoning_report(model: Qwen2ForCausalLM, n: int = 200) -> dict[str, dict[str, float]]:
    """Held-out text accuracy of the careful and the brief style, and of the mixture that the model itself chooses."""
    return {
        "careful": text_accuracy(model, "think", n=n, careful=True),
        "brief": text_accuracy(model, "think", n=n, careful=False),
        "greedy": text_accuracy(model, "think", n=n),
        "sampled": text_accuracy(model, "think", n=n, temperature=1.0),
    }


def save_language_model(model: Qwen2ForCausalLM, output_dir: Path, chat_template: str) -> None:
    """Writes model and tokenizer as a folder that transformers loads."""
    model.save_pretrained(output_dir)
    build_tokenizer(chat_template).save_pretrained(output_dir)

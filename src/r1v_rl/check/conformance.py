"""`r1v-rl check model`: whether a model folder computes the same in every way in which training and rollout run it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from r1v_rl.check.report import Report
from r1v_rl.data.chat import load_processor
from r1v_rl.data.dataset import examples_from_rows
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.evaluate.accuracy import blanked
from r1v_rl.grpo.batch import GenerationBatch, model_inputs, score
from r1v_rl.models.families import token_positions, token_types
from r1v_rl.models.logprobs import add_logprob_head
from r1v_rl.models.packing import enable_packing, why_not_packed
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt, placeholder_ids
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.training.launch import load_model

PICTURES = {"text": [], "one picture": [(320, 240)], "three pictures": [(224, 224), (448, 224), (160, 320)]}
"""Width and height of each prompt's pictures."""
LENGTHS = [5, 9, 3]
"""Tokens of each prompt's completions."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Between log-probabilities, in nats: what sums in another order make of large activations at most; a position or a
picture in the wrong place makes more."""


@dataclass
class ConformanceConfig:
    """What is looked at."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The model folder or hub id."})
    dtype: str = field(default="float32", metadata={"help": "In which everything is computed: float32 or bfloat16."})
    use_vllm: bool = field(default=True, metadata={"help": "Hold vLLM's log-probabilities against the model's, too."})

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise RecipeError("`check model` needs `--model_name_or_path`: a model folder or a hub id")
        if self.dtype not in TOLERANCE:
            raise RecipeError(f"dtype must be {' or '.join(TOLERANCE)}, received {self.dtype!r}")


def check_model(config: ConformanceConfig, report: Report) -> None:
    """Made-up prompts (text only, one picture, three of unlike size) with random completions: the trainer's padded and
    shared forward and vLLM against the model's own forward, one row at a time; and whether pictures matter."""
    path = str(config.model_name_or_path)
    print(f"checking {path} in {config.dtype}")
    loaded = report.look("model", lambda: ("loads", _Subject(path, config)))
    if loaded is None:
        return
    report.look("tokens", loaded.tokens)
    report.look("padded", lambda: loaded.agrees(share_prefix=False))
    report.look("shared", loaded.shared)
    report.look("pictures", loaded.pictures_matter)
    if config.use_vllm:
        report.look("rollout", lambda: loaded.rollout(path))


class _Subject:
    """The model, three prompts, their completions, and the log-probabilities by the model's own forward."""

    def __init__(self, path: str, config: ConformanceConfig):
        self.dtype = config.dtype
        self.processor = load_processor(path)
        self.model: Any = load_model(path, {"dtype": config.dtype}).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        rows = [
            {"id": name, "prompt": [{"role": "user", "content": "What is to be seen?"}], "images": _pictures(sizes)}
            for name, sizes in PICTURES.items()
        ]
        examples = examples_from_rows(rows, images_without_marks="prepend", answer_required=False)
        self.prompts = [self._encoded(example) for example in examples]
        self.completions = _random_texts(self.processor, len(self.prompts) * len(LENGTHS))
        self.own = [self._own(self.prompts[r // len(LENGTHS)], ids) for r, ids in enumerate(self.completions)]
        self.why_not_shared = why_not_packed(self.model)
        add_logprob_head(self.model, temperature=1.0, float32_head=False)

    def _encoded(self, example: Any) -> EncodedPrompt:
        prompt = encode_prompt(self.processor, example, device=self.model.device)
        own = token_positions(self.model, [prompt.prompt_ids], prompt.vision_inputs.get("image_grid_thw"))
        prompt.positions = own[0] if own else None
        if "pixel_values" in prompt.vision_inputs:
            prompt.vision_inputs["pixel_values"] = prompt.vision_inputs["pixel_values"].to(self.model.dtype)
        return prompt

    @torch.no_grad()
    def _own(self, prompt: EncodedPrompt, ids: list[int]) -> Tensor:
        """By the model's own forward on what its processor gives."""
        row = torch.tensor([prompt.prompt_ids + ids], device=self.model.device)
        logits = self.model(input_ids=row, **prompt.vision_inputs, **token_types(self.model, row)).logits[0]
        scores = logits[-len(ids) - 1 : -1].float().log_softmax(-1)
        return scores[range(len(ids)), ids].cpu()

    def tokens(self) -> tuple[str, None]:
        """The model takes as many features as the prompt has placeholders, or its own forward had raised."""
        special = set(placeholder_ids(self.model.config))
        counts = [sum(token in special for token in prompt.prompt_ids) for prompt in self.prompts]
        if counts[0] or not all(counts[1:]):
            raise UserError(f"text, one and three pictures have {counts} visual tokens; text alone must have none")
        return f"visual tokens of one picture {counts[1]}, of three {counts[2]}", None

    @torch.no_grad()
    def agrees(self, *, share_prefix: bool) -> tuple[str, None]:
        """All rows in one batch against each alone."""
        batch = GenerationBatch(
            prompts=self.prompts, completion_ids=self.completions, counts=[True] * len(self.completions),
            advantages=torch.zeros(len(self.completions)), process_tokens=1.0, weight_version=0,
        )  # fmt: skip
        inputs = model_inputs(
            batch, range(len(self.completions)), pad_token_id=_pad(self.processor),
            device=self.model.device, share_prefix=share_prefix,
        )  # fmt: skip
        logprobs, _ = score(self.model, inputs)
        found = [row[mask].cpu() for row, mask in zip(logprobs, inputs.token_mask, strict=True)]
        return self._compared(found, "every prompt once, all rows in one batch" if share_prefix else "all rows padded")

    def shared(self) -> tuple[str, None]:
        if self.why_not_shared:
            return f"not used: every prompt is run once a completion, because {self.why_not_shared}", None
        enable_packing(self.model)
        return self.agrees(share_prefix=True)

    def pictures_matter(self) -> tuple[str, None]:
        """Grey pictures of the same sizes must change what follows."""
        prompt = self.prompts[1]
        ids = self.completions[len(LENGTHS)]
        grey = self._own(self._encoded(blanked(prompt.example)), ids)
        change = (grey - self._own(prompt, ids)).abs().max().item()
        if change <= TOLERANCE["float32"]:
            raise UserError(f"a grey picture changes log-probabilities by {change:.0e} at most: the model does not see")
        return f"a grey picture changes log-probabilities by up to {change:.2g}", None

    def rollout(self, path: str) -> tuple[str, None]:
        """vLLM must read the same tokens, and say the same of them."""
        every = [prompt for prompt in self.prompts for _ in LENGTHS]
        longest = max(len(p.prompt_ids) + len(ids) for p, ids in zip(every, self.completions, strict=True))
        settings = {"use_vllm": True, "dtype": self.dtype, "max_model_len": longest + 1, "max_images": 3}
        with standalone_engine(path, self.processor, **settings) as engine:  # type: ignore[arg-type]
            engine.generate(self.prompts, Sampling(1, 1, temperature=0.0), seed=0)  # refuses other prompt tokens
            found = engine.token_logprobs(every, self.completions)
        return self._compared([torch.tensor(row) for row in found], "vLLM, same prompt tokens")

    def _compared(self, found: Sequence[Tensor], what: str) -> tuple[str, None]:
        errors = dict.fromkeys(PICTURES, 0.0)
        for r, (row, own) in enumerate(zip(found, self.own, strict=True)):
            name = list(PICTURES)[r // len(LENGTHS)]
            errors[name] = max(errors[name], (row - own).abs().max().item())
        said = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        if max(errors.values()) > TOLERANCE[self.dtype]:
            raise UserError(
                f"{what}: log-probabilities differ from the model's own forward by {said} "
                f"(at most {TOLERANCE[self.dtype]:g} in {self.dtype})"
            )
        return f"{what}: {said}", None


def _pictures(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Noise, which looks like nothing else."""
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes)
    return [Image.fromarray(pixels.numpy()) for pixels in noise]


def _random_texts(processor: Any, count: int) -> list[list[int]]:
    """Token ids without special ones."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(1)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    return [plain[torch.randint(len(plain), (n,), generator=generator)].tolist() for n in lengths]


def _pad(processor: Any) -> int:
    return getattr(processor, "tokenizer", processor).pad_token_id or 0

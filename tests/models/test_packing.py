"""Packed rows give the log-probabilities and gradients of plain padded ones, and planted errors are seen."""

import copy
import re
from itertools import chain

import pytest
import torch
from random_vlm import random_vlm
from torch import Tensor
from transformers import AttentionMaskInterface, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from r1v_rl.errors import UserError
from r1v_rl.models import packing
from r1v_rl.models.attention_parts import CpuFlash, PlainMath, kernel_error, kernel_for
from r1v_rl.models.packing import PackedLayout, enable_packing, why_not_packed

FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}
TILES = [1, 0, 3]
"""Of each prompt: one tile, text only, three tiles."""
TEXT = [9, 6, 13]
COMPLETIONS = [[5, 1, 8], [3, 3], [7, 2, 4, 4]]


class Groups:
    """Prompts with and without tiles, and completions of ragged lengths."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(5)
        image, size = model.config.image_token_id, model.config.image_seq_length
        draw = lambda n: torch.randint(40, 700, (n,), generator=generator).tolist()  # noqa: E731
        self.prompts = [draw(3) + [image] * (tiles * size) + draw(n) for tiles, n in zip(TILES, TEXT, strict=True)]
        self.completions = [[draw(n) for n in lengths] for lengths in COMPLETIONS]
        self.pixels = torch.randn(sum(TILES), 3, 32, 32, generator=generator)
        self.starts = [sum(TILES[:i]) for i in range(len(TILES))]

    def plain(self, model) -> list[Tensor]:
        """Log-probabilities of every completion's tokens: right-padded rows, the prompt and its tiles repeated."""
        rows = [p + c for p, cs in zip(self.prompts, self.completions, strict=True) for c in cs]
        owners = [i for i, cs in enumerate(self.completions) for _ in cs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        pixels = torch.cat([self.pixels[self.starts[i] : self.starts[i] + TILES[i]] for i in owners])
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
        prompt_lengths = [len(self.prompts[i]) for i in owners]
        return [
            _logprobs(logits[r, p - 1 : len(row) - 1], row[p:])
            for r, (row, p) in enumerate(zip(rows, prompt_lengths, strict=True))
        ]

    def layout(self) -> PackedLayout:
        lengths, prefixes = [], []
        for prompt, completions in zip(self.prompts, self.completions, strict=True):
            owner = len(lengths)
            lengths += [len(prompt), *map(len, completions)]
            prefixes += [None] + [owner] * len(completions)
        return PackedLayout.of(lengths, prefixes)

    def packed(self, model, **changes) -> list[Tensor]:
        """The same through one row, every prompt and tile once."""
        layout = self.layout()
        row = [t for p, cs in zip(self.prompts, self.completions, strict=True) for t in chain(p, *cs)]
        kwargs = {**layout.forward_kwargs(), **changes}
        logits = model(
            input_ids=torch.tensor([row]), pixel_values=self.pixels.to(model.dtype), use_cache=False, **kwargs
        ).logits[0]
        found = []
        for segment in layout.segments:
            if segment.prefix is not None:
                last = layout.segments[segment.prefix].end - 1
                positions = [last, *range(segment.start, segment.end - 1)]
                found.append(_logprobs(logits[positions], row[segment.start : segment.end]))
        return found


def _logprobs(logits: Tensor, targets: list[int]) -> Tensor:
    return logits.float().log_softmax(-1)[range(len(targets)), targets]


def gradients(model, logprobs: list[Tensor]) -> dict[str, Tensor]:
    """Of a sum in which every token has another weight."""
    weights = torch.randn(sum(map(len, logprobs)), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (torch.cat(logprobs) * weights).sum().backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[n] - g).norm() / g.norm().clamp(min=1e-12)).item() for n, g in expected.items())


def models(family: str = "qwen2"):
    """(the plain model, its packed twin, groups)"""
    plain, _ = random_vlm(text_config_class=FAMILIES[family])
    plain.config.text_config.sliding_window = None  # Mistral's default is one
    packed = copy.deepcopy(plain)
    enable_packing(packed)
    return plain.train(), packed.train(), Groups(plain)


def assert_same(plain, packed, groups: Groups, **changes) -> None:
    expected, found = groups.plain(plain), groups.packed(packed, **changes)
    assert max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) <= 5e-6
    assert worst_gradient_error(gradients(packed, found), gradients(plain, expected)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
def test_a_packed_row_equals_padded_rows(family, checkpointing):
    plain, packed, groups = models(family)
    if checkpointing is not None:
        packed.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_same(plain, packed, groups)


def test_lora_gradients(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain, packed, groups = models()
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    wrapped = []
    for model in (plain, packed):
        torch.manual_seed(1)
        wrapped.append(get_peft_model(model, LoraConfig(**settings)).train())
    assert_same(*wrapped, groups)


def test_the_gradient_of_the_merged_blocks_is_exact():
    """Against finite differences in float64, with grouped heads, two groups and ragged segments."""
    layout = PackedLayout.of([4, 2, 3, 3, 1], prefixes=[None, 0, 0, None, 3])
    torch.manual_seed(0)
    q = torch.randn(1, 4, 13, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 13, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    attend = lambda *qkv: packing.packed_attention(torch.nn.Identity(), *qkv, None, packed_layout=layout)[0]  # noqa: E731
    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float32_as_the_plain_forward(autocast):
    """Mixed precision and pure bfloat16; the error of the whole gradient, against the plain forward's own."""
    reference, packed, groups = models()
    expected = _flat(gradients(reference, groups.plain(reference)))
    plain = copy.deepcopy(reference)
    if not autocast:
        plain, packed = plain.bfloat16(), packed.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, ours = groups.plain(plain), groups.packed(packed)
    their_error = (_flat(gradients(plain, theirs)) - expected).norm() / expected.norm()
    our_error = (_flat(gradients(packed, ours)) - expected).norm() / expected.norm()
    assert our_error <= 1.25 * their_error, (our_error, their_error)


def _flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


def test_segments_without_prefix_are_rows_of_their_own():
    """Sequence packing, as SFT uses it."""
    plain, packed, groups = models()
    row = list(chain(*groups.prompts))
    layout = PackedLayout.of([len(p) for p in groups.prompts])
    logits = packed(input_ids=torch.tensor([row]), pixel_values=groups.pixels, **layout.forward_kwargs()).logits[0]
    for prompt, segment, tiles, start in zip(groups.prompts, layout.segments, TILES, groups.starts, strict=True):
        pixels = {"pixel_values": groups.pixels[start : start + tiles]} if tiles else {}
        alone = plain(input_ids=torch.tensor([prompt]), **pixels).logits[0]
        torch.testing.assert_close(logits[segment.start : segment.end], alone, rtol=1e-5, atol=1e-5)


def test_without_a_layout_everything_is_as_before():
    plain, packed, groups = models()
    for a, b in zip(groups.plain(packed), groups.plain(plain), strict=True):
        assert torch.equal(a, b)
    prompt = {"input_ids": torch.tensor([groups.prompts[0]]), "pixel_values": groups.pixels[:1]}
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(packed.eval().generate(**prompt, **settings), plain.eval().generate(**prompt, **settings))


def test_no_mask_over_the_whole_row(monkeypatch):
    """A mask of T x T is made for padded rows only."""
    _, packed, groups = models()
    made = []
    original = packing.sdpa_mask
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, packing.ATTENTION, lambda **kw: made.append(kw) or original(**kw)
    )
    groups.packed(packed)
    assert not made
    groups.plain(packed)
    assert made


# ---- planted errors ----------------------------------------------------------------------------------------------


def test_a_position_off_by_one_would_be_seen():
    plain, packed, groups = models()
    layout = groups.layout()
    positions = layout.position_ids()
    for segment in layout.segments:
        if segment.prefix is not None:
            positions[0, segment.start : segment.end] += 1
    with pytest.raises(AssertionError):
        assert_same(plain, packed, groups, position_ids=positions)


@pytest.mark.parametrize("leak", ["sees a sibling", "sees another group's prompt", "does not see its prompt"])
def test_a_leaking_mask_would_be_seen(monkeypatch, leak):
    plain, packed, groups = models()
    blocks = PackedLayout.blocks

    def planted(self):
        found = blocks(self)
        queries, keys, _ = next(block for block in found if not block[2])
        rest = [block for block in found if block != (queries, keys, False)]
        first = next(s for s in self.segments if s.prefix is not None)
        other = [s for s in self.segments if s.prefix is None][1]
        return {
            "sees a sibling": [*found, (slice(first.end, queries.stop), slice(first.start, first.end), False)],
            "sees another group's prompt": [*found, (queries, slice(other.start, other.end), False)],
            "does not see its prompt": rest,
        }[leak]

    monkeypatch.setattr(PackedLayout, "blocks", planted)
    with pytest.raises(AssertionError):
        assert_same(plain, packed, groups)


def test_a_detached_prefix_would_be_seen(monkeypatch):
    """The prompt's keys and values get no gradient from the completions."""
    plain, packed, groups = models()

    class Detached(CpuFlash):
        def backward(self, *args, causal, scale):
            q, k, v = super().backward(*args, causal=causal, scale=scale)
            return (q, k, v) if causal else (q, torch.zeros_like(k), torch.zeros_like(v))

    monkeypatch.setattr(packing, "kernel_for", lambda q: Detached())
    with pytest.raises(AssertionError):
        assert_same(plain, packed, groups)


# ---- layouts, kernels, refusals -----------------------------------------------------------------------------------


def test_layout_positions_and_blocks():
    layout = PackedLayout.of([4, 2, 3, 5, 1], prefixes=[None, 0, 0, None, 3])
    assert layout.num_tokens == 15
    assert layout.position_ids().tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 2, 3, 4, 5]]
    assert [(q.start, q.stop, k.start, k.stop) for q, k, causal in layout.blocks() if not causal] == [
        (4, 9, 0, 4),
        (14, 15, 9, 14),
    ]


@pytest.mark.parametrize(
    ("lengths", "prefixes", "message"),
    [
        ([3, 0], None, "segment 1 has 0 tokens"),
        ([3, 2], [None, 1], "segment 1 continues 1"),
        ([3, 2, 2], [None, 0, 1], "segment 2 continues 1"),
    ],
)
def test_impossible_layouts_are_refused(lengths, prefixes, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.of(lengths, prefixes)


def test_a_row_of_another_length_is_refused():
    _, packed, groups = models()
    with pytest.raises(ValueError, match="a packed row needs batch size 1, 3 tokens"):
        groups.packed(packed, packed_layout=PackedLayout.of([3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 96])
def test_the_fused_kernel_is_used_and_right(dtype, head_size):
    assert isinstance(kernel_for(torch.zeros(1, 1, 1, head_size, dtype=dtype)), CpuFlash)
    assert kernel_error(CpuFlash(), "cpu", dtype, head_size) <= 8 * torch.finfo(dtype).eps
    assert kernel_error(PlainMath(), "cpu", dtype, head_size) <= 8 * torch.finfo(dtype).eps


def test_a_wrong_kernel_would_be_seen():
    class NotCausal(CpuFlash):
        def forward(self, q, k, v, *, causal, scale):
            return super().forward(q, k, v, causal=False, scale=scale)

    assert kernel_error(NotCausal(), "cpu", torch.float32, 32) > 1e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma3_text"}, "its language model is a `gemma3_text`; known are llama, mistral, qwen2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "some of its layers see a sliding window only"),
        ({"sliding_window": 16, "layer_types": None}, "some of its layers see a sliding window only"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "some of its layers are linear attention"),
        ({"use_bidirectional_attention": True}, "its image tokens see those after them"),
        ({"attention_dropout": 0.1}, "attention dropout (0.1)"),
    ],
)
def test_models_that_cannot_are_refused_with_the_reason(changes, reason):
    model, _ = random_vlm()
    for key, value in changes.items():
        object.__setattr__(model.config.text_config, key, value)
    assert reason in why_not_packed(model)
    with pytest.raises(UserError, match=re.escape(reason)):
        enable_packing(model)

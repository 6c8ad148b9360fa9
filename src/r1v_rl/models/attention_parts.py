"""Attention of one block of queries to one block of keys, with its log-sum-exp, so that blocks can be merged exactly.

With two blocks of keys, softmax attention to both is a weighted mean of the attention to each, weighted by
`exp(logsumexp)` (arXiv:1805.02867). Its gradient is each block's own, taken with the *merged* output and log-sum-exp:
what fused attention kernels keep for their backward pass is all that it takes. Nothing of the size queries x keys is
stored, and keys that many queries share are never copied.
"""

import functools
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

Queries = Float[Tensor, "B H Q D"]
Keys = Float[Tensor, "B H K D"]
Rows = Float[Tensor, "B H Q"]


@runtime_checkable
class AttentionKernel(Protocol):
    """Forward and backward of one block. B batch rows, H heads, Q queries, K keys, D head size; any strides but the
    last (1), so that expanded heads (stride 0) need no copy. `causal` needs Q == K."""

    def forward(self, q: Queries, k: Keys, v: Keys, *, causal: bool, scale: float) -> tuple[Queries, Rows]:
        """Output, and the natural log-sum-exp of the scaled scores of each query, float32 or wider."""

    def backward(
        self, grad: Queries, q: Queries, k: Keys, v: Keys, out: Queries, lse: Rows, *, causal: bool, scale: float
    ) -> tuple[Queries, Keys, Keys]:
        """Gradients of q, k and v, with `out` and `lse` those of all blocks merged."""


class CpuFlash:
    """torch's fused attention on a CPU."""

    def forward(self, q, k, v, *, causal, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def backward(self, grad, q, k, v, out, lse, *, causal, scale):
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


class CudaFlash:
    """torch's own FlashAttention 2: bfloat16 and float16 on a CUDA device, head size a multiple of 8."""

    def forward(self, q, k, v, *, causal, scale):
        op = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = op(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, *, causal, scale):
        op = torch.ops.aten._scaled_dot_product_flash_attention_backward
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # the dropout's random state: there is none
        lengths = q.shape[2], k.shape[2]
        return op(grad, q, k, v, out, lse, None, None, *lengths, 0.0, causal, unused, unused, scale=scale)


class PlainMath:
    """Matrix products and a softmax: any device and dtype, and what the fused kernels are checked against."""

    def forward(self, q, k, v, *, causal, scale):
        scores = self._scores(q, k, causal, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse

    def backward(self, grad, q, k, v, out, lse, *, causal, scale):
        weights = (self._scores(q, k, causal, scale) - lse[..., None]).exp()
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = (weights * ((grad @ v.mT).to(weights.dtype) - delta) * scale).to(q.dtype)
        return grad_scores @ k, grad_scores.mT @ q, weights.to(grad.dtype).mT @ grad

    @staticmethod
    def _scores(q, k, causal, scale):
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), -torch.inf)
        return scores


def kernel_for(q: Tensor) -> AttentionKernel:
    """The fastest kernel that computes right on `q`'s device, for its dtype and head size; tried once for each."""
    return _chosen(q.device.type, q.dtype, q.shape[-1])


@functools.cache
def _chosen(device: str, dtype: torch.dtype, head_size: int) -> AttentionKernel:
    candidates: dict[str, AttentionKernel] = {"cpu": CpuFlash(), "cuda": CudaFlash()}
    kernel = candidates.get(device)
    if kernel is None or dtype == torch.float64 or (device == "cuda" and dtype == torch.float32):
        return PlainMath()  # the fused kernels keep a float32 log-sum-exp, and CUDA's has no float32
    try:
        error = kernel_error(kernel, device, dtype, head_size)
    except RuntimeError as failure:
        reason = str(failure).splitlines()[0]
    else:
        if error <= 8 * torch.finfo(dtype).eps:
            return kernel
        reason = f"its error is {error:.1e}"
    logger.warning(
        f"{type(kernel).__name__} is not used for {dtype} with head size {head_size} on this {device} "
        f"({reason}); packed attention runs on plain matrix products, which is slower"
    )
    return PlainMath()


@torch.no_grad()
def kernel_error(kernel: AttentionKernel, device: str, dtype: torch.dtype, head_size: int) -> float:
    """Largest relative error (norm over norm) of outputs and gradients against plain float64 math, for a causal block
    and one that is not, with heads expanded as in grouped-query attention."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for causal, queries in ((True, 40), (False, 24)):
        q, grad = (torch.randn(1, 2, queries, head_size, generator=generator).to(device, dtype) for _ in range(2))
        k, v = (
            torch.randn(1, 1, 40, head_size, generator=generator).to(device, dtype).expand(1, 2, 40, head_size)
            for _ in range(2)
        )
        settings = {"causal": causal, "scale": head_size**-0.5}
        exact = PlainMath()
        expected_out, expected_lse = exact.forward(q.double(), k.double(), v.double(), **settings)
        out, lse = kernel.forward(q, k, v, **settings)
        expected = exact.backward(
            grad.double(), q.double(), k.double(), v.double(), expected_out, expected_lse, **settings
        )
        got = kernel.backward(grad, q, k, v, out, lse, **settings)
        pairs = [(out, expected_out), (lse, expected_lse), *zip(got, expected, strict=True)]
        worst = max(worst, *(((a.double() - b).norm() / b.norm()).item() for a, b in pairs))
    return worst

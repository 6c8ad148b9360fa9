"""The last layer runs where its output is read: the other rows of a packed row are keys and values there, and no more.

Of a shared prompt one token is scored, its last; the layers before the last one need all of it. The last one needs its
keys and values, for the completions, but no queries, no attention of its own and no MLP. Exact: values and gradients
of the rows that are read are those of the whole row.
"""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

READ = "rows_read"
"""Keyword of the forward, which transformers hands down to every layer: the rows (N,) that are read, each once."""


def skip_unread_rows(model: PreTrainedModel) -> None:
    """Teach `model` the keyword `rows_read` of a packed row's forward. Its last layer must be plain attention and MLP,
    as in `packing.SUPPORTED_LANGUAGE_MODELS`. Call it before PEFT or an engine wraps the model."""
    layer = model.get_decoder().layers[-1]
    rows = _Rows()
    layer.register_forward_pre_hook(rows.note, with_kwargs=True)
    for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
        module.register_forward_pre_hook(rows.take)
        module.register_forward_hook(rows.put_back)


class _Rows:
    """Hooks of one layer. The rows come with its keywords: gradient checkpointing has them when it runs it again."""

    def __init__(self) -> None:
        self._read: Int[Tensor, " N"] | None = None
        self._length = 0

    def note(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self._read = kwargs.get(READ)
        if self._read is None:
            return None
        return args, kwargs | {"packed_layout": kwargs["packed_layout"].reading(self._read)}

    def take(self, module: nn.Module, args: tuple[Float[Tensor, "B T D"]]) -> tuple[Tensor] | None:
        if self._read is None:
            return None
        self._length = args[0].shape[1]
        return (args[0].index_select(1, self._read),)

    def put_back(self, module: nn.Module, args: tuple, out: Float[Tensor, "B N D"]) -> Float[Tensor, "B T D"]:
        if self._read is None:
            return out
        whole = out.new_zeros(out.shape[0], self._length, out.shape[2])
        return whole.index_copy(1, self._read, out)

"""The values that flow from the dataset to the loss. The unit is the group: one prompt and its G completions.

Dimension letters, used in every shape of this package:
`P` prompts, `G` completions per prompt, `B` rows (P * G), `T` token positions, `V` vocabulary, `I` images, `K` tiles,
`N` visual tokens, `D` hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

ImageSource = Any
"""A PIL image, encoded bytes, or a path; `r1v_rl.data.images.load_image` turns each into an RGB PIL image."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a dataset, read and checked."""

    id: str
    """Unique in its dataset; every message about the row names it."""
    messages: list[dict[str, Any]]
    """Chat messages up to the assistant's turn; `content` is a list of `{"type": "text", "text": ...}` and
    `{"type": "image"}` blocks, with as many image blocks as `images`."""
    images: tuple[ImageSource, ...]
    """In the order of the image blocks; empty for a text-only row."""
    answer: str | None
    """The gold answer as written in the dataset."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every column of the row, handed to reward functions by name (images excepted)."""


@dataclass(slots=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]
    """Sampled tokens, the end token included where one was sampled; never an image placeholder."""
    logprobs: list[float]
    """The sampler's log-probability of each token at temperature 1, before any ban."""
    text: str
    """The decoded tokens without special ones."""
    is_truncated: bool
    """Whether the length limit, rather than an end token, ended it."""
    weight_version: int | None = None
    """Number of optimizer steps behind the (oldest) weights that sampled it; None where nothing trains."""
    is_partial: bool = False
    """Whether it was stopped before it ended, and waits to be continued: nothing may train on it yet."""


@dataclass(slots=True)
class RolloutGroup:
    """One prompt and its G completions."""

    example: Example
    prompt_ids: list[int]
    """What the model saw: image placeholders expanded to one token per visual token."""
    completions: list[Completion]
    weight_version: int
    """Number of optimizer steps behind the (oldest) weights that sampled it."""

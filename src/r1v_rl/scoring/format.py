"""The format reward: one think block that holds something, then the answer in a box."""

import re

DEFAULT_FORMAT_PATTERN = (
    r"\A\s*+<think>"
    r"(?=\s*+(?!</think>)\S\s*+(?!</think>)\S)"  # the reasoning is more than one character
    r"(?:(?!(?i:<\s*+/?\s*+think\s*+>))[\s\S])++"
    r"</think>"
    r"(?:(?!(?i:<\s*+/?\s*+think\s*+>)|\\boxed\s*+\{\s*+[^\s}])[\s\S])*+"
    r"\\boxed\s*+\{\s*+[^\s}]"
    r"(?:(?!(?i:<\s*+/?\s*+think\s*+>))[^}])*+\}"
    r"(?:(?!(?i:<\s*+/?\s*+think\s*+>))[\s\S])*+\Z"
)
"""Exactly one `<think>...</think>`, first, with more than one character in it; then, with no further think tag in any
spelling, a `\\boxed{}` that is not empty. Every repetition is possessive, so the search takes one pass over the
text."""


def prompt_opens_think(rendered_prompt: str) -> bool:
    """Whether a prompt, as rendered by the chat template with its generation prompt, ends inside an open `<think>`."""
    return rendered_prompt.rstrip().endswith("<think>")


def with_prompt_think(completion: str, opened: bool | None) -> str:
    """The completion with the `<think>` that its prompt opened put back.

    Args:
        opened: Whether the prompt opened it; None where that is not known: then it did if the completion closes a
            block that it has not opened.
    """
    if opened is None:
        head, close, _ = completion.partition("</think>")
        opened = bool(close) and "<think>" not in head
    return "<think>" + completion if opened else completion


def has_format(completion: str, pattern: str = DEFAULT_FORMAT_PATTERN, opened: bool | None = None) -> bool:
    """Whether the completion, with the `<think>` of its prompt put back, is as the pattern wants it (`re.search`).

    A pattern of a recipe can take exponential time; the `format` reward runs those in a worker process under a
    deadline.
    """
    return re.search(pattern, with_prompt_think(completion, opened)) is not None

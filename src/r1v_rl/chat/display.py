"""An answer on the screen while it is written: the thinking dimmed or under a heading, then the answer."""

import os
import re
from typing import TextIO

THINK, END_THINK = "<think>", "</think>"
_DIM, _NORMAL = "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a model must not send to a terminal: escape sequences move the cursor, set titles, and worse."""


class Display:
    """Receives an answer's text piece by piece and shows it.

    On a terminal the thinking is dimmed; elsewhere it stands under `Thinking:` and the rest under `Answer:`.

    Args:
        out: Where to.
        thinking: Whether the prompt opened the thinking already.
        show_thinking: False tells its length in words instead.
    """

    def __init__(self, out: TextIO, *, thinking: bool, show_thinking: bool = True):
        self._out = out
        self._dims = out.isatty() and "NO_COLOR" not in os.environ
        self._shows = show_thinking
        self._held = ""  # the start of what may be a tag
        self._at_start = True  # nothing but blanks so far in this part
        self._thinking = False
        self._had_thinking = False
        self._thought: list[str] = []
        self._answer: list[str] = []
        if thinking:
            self._open()

    @property
    def answer(self) -> str:
        """What was said outside the thinking."""
        return "".join(self._answer).strip()

    def feed(self, text: str) -> None:
        """The next piece of the answer."""
        self._held += text
        while True:
            tag = END_THINK if self._thinking else THINK
            before, found, rest = self._held.partition(tag)
            if found and (self._thinking or not self.answer + before.strip()):
                self._show(before)
                self._held = rest
                self._close() if self._thinking else self._open()
                continue
            kept = _possible_start(self._held, tag)
            self._show(self._held[: len(self._held) - kept])
            self._held = self._held[len(self._held) - kept :]
            return

    def end(self) -> None:
        """The answer is complete, or was stopped."""
        self._show(self._held)
        self._held = ""
        if self._thinking:
            self._close(heading=False)
        self._out.write("\n")
        self._out.flush()

    def _show(self, text: str) -> None:
        (self._thought if self._thinking else self._answer).append(text)
        if self._at_start:
            text = text.lstrip()
        if not text:
            return
        if self._at_start and self._thinking and self._shows:
            self._out.write(_DIM if self._dims else "Thinking:\n")
        self._at_start = False
        if not self._thinking or self._shows:
            self._out.write(_CONTROL.sub("", text))
            self._out.flush()

    def _open(self) -> None:
        self._thinking = self._had_thinking = self._at_start = True

    def _close(self, *, heading: bool = True) -> None:
        """The thinking is over."""
        shown = self._shows and not self._at_start
        if shown and self._dims:
            self._out.write(_NORMAL)
        if not self._shows:
            self._out.write(f"({len(''.join(self._thought).split())} words of thinking)\n")
        if heading:
            self._out.write("\n\n" if shown else "")
            self._out.write("" if self._dims else "Answer:\n")
        self._thinking, self._at_start = False, True


def _possible_start(text: str, tag: str) -> int:
    """Length of the longest end of `text` that may be the start of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)

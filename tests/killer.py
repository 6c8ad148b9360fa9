"""Ends a training run by SIGKILL at a chosen moment: what a test of resume begins with."""

import os
import resource
import signal
import sys

import r1v_rl  # isort: skip  # noqa: F401  (prepares a spawned process before torchvision is imported)
from transformers import TrainerCallback


class Killer(TrainerCallback):
    """SIGKILL to itself: after a step and its save, before the save, or at the n-th file the save opens to write.

    `full disk` kills nobody: from that save on files end after 50,000 bytes, as they do where no space is left.
    """

    def __init__(self, step: int, moment: str, nth: int = 0):
        self.step, self.moment, self.nth = step, moment, nth
        self._opened = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.moment == "before save":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.moment == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if self.moment == "inside save":
            sys.addaudithook(self._audit)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.moment == "after save":
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        if writes:
            if self._opened == self.nth:
                os.kill(os.getpid(), signal.SIGKILL)
            self._opened += 1

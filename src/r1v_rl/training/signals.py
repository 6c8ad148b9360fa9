"""Stopping a run from outside without losing anything."""

import signal
from types import FrameType
from typing import Any

import torch.distributed
from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end the run after the present optimizer step, with a checkpoint; a second one at once.

    Of several ranks one may hear of it a step before another: they agree after every step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that ended the run, or None."""
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            heard = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.received = int(heard) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        print(
            f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint; again = at once", flush=True
        )
        self.restore()

    def restore(self) -> None:
        """Give the signals back to who had them; called when training ends, however it ends."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

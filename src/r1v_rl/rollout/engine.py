"""What a rollout engine is: something that samples completions of prompts, with weights it is given."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from r1v_rl.rollout.prompts import EncodedPrompt
from r1v_rl.types import Completion


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    num_generations: int
    max_tokens: int | Sequence[int]
    """One for all prompts, or one for each."""
    temperature: float = 1.0
    """0 takes the most likely token; `num_generations` must be 1 then."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float | None = None
    repetition_penalty: float | Sequence[float] = 1.0
    """One for all prompts, or one for each; logits of tokens of the prompt and of the completion so far are divided by
    it where they are positive, and multiplied where they are not."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The recipe's `generation_kwargs`, in the engine's own names."""

    @property
    def most_tokens(self) -> int:
        """The largest limit."""
        return max(self.max_tokens) if isinstance(self.max_tokens, Sequence) else self.max_tokens

    def limits(self, num_prompts: int) -> list[tuple[int, float]]:
        """(most tokens, repetition penalty) of each prompt."""
        tokens, penalties = self.max_tokens, self.repetition_penalty
        tokens = tokens if isinstance(tokens, Sequence) else [tokens] * num_prompts
        penalties = penalties if isinstance(penalties, Sequence) else [penalties] * num_prompts
        assert len(tokens) == len(penalties) == num_prompts
        return list(zip(tokens, penalties, strict=True))


OnGroup = Callable[[int, list[Completion]], None]
"""Told of a prompt, by its number, and its completions, once and as soon as all of them are there; quick, and called
from whatever thread the engine waits in."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions. Implementations: `rollout.hf` (reference), `rollout.vllm_inprocess`, `rollout.servers`."""

    def sync_weights(self, policy: nn.Module, version: int = 0) -> None:
        """Take over the policy's present weights, and forget everything computed with older ones.

        Args:
            version: Optimizer steps behind them; every completion that they sample carries it.
        """
        ...

    def generate(
        self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """`num_generations` completions for each prompt, in order; the same seed and weights give the same ones."""
        ...

    def token_logprobs(self, prompts: list[EncodedPrompt], texts: list[list[int]]) -> list[list[float]]:
        """For each prompt the log-probability, at temperature 1, of every token of a text that follows it."""
        ...


@runtime_checkable
class BackgroundEngine(RolloutEngine, Protocol):
    """One that can be asked from another thread, while the trainer updates."""

    async def generate_async(
        self, prompts: list[EncodedPrompt], sampling: Sampling, *, seed: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """As `generate`; gives up what it has in hand when it is cancelled. No weights may be synced meanwhile."""
        ...


@runtime_checkable
class PartialEngine(RolloutEngine, Protocol):
    """One that can be told to stop, and to go on with what it had."""

    def generate_first(
        self,
        prompts: list[EncodedPrompt],
        sampling: Sampling,
        *,
        seed: int,
        begun: Sequence[Sequence[Completion]],
        enough: Callable[[Set[int]], bool],
    ) -> list[list[Completion]]:
        """As `generate`, until `enough` says of the places of the groups that are whole that no more are needed.

        Args:
            begun: What there is of each group: an empty row, or all its completions, some of them partial.

        Returns:
            The same of all groups, one that was not got to as it was.
        """
        ...


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """One that can also hand out an answer while it is written."""

    def stream(
        self, prompt: EncodedPrompt, sampling: Sampling, *, seed: int, on_text: Callable[[str], None]
    ) -> Completion:
        """One completion; `on_text` receives its text piece by piece, without special tokens."""
        ...

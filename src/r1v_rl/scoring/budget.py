"""What a run may spend on chat models: calls, tokens, money. It stops before the limit is passed, nothing lost."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from r1v_rl.errors import UserError
from r1v_rl.scoring.replies import ReplyStore, Spent

MILLION = 1_000_000


class BudgetReached(UserError):
    """The next call would pass a limit; what was paid for is kept."""


class CallRefused(BaseException):
    """Raised inside a request that must not be sent; no library's `except Exception` may turn it into a retry."""


@dataclass
class Budget:
    """Limits of a run, over what the store holds of earlier ones; None is no limit.

    A request counts as a call when it is sent, a retry too. Tokens are those that the endpoint reports; a request in
    flight counts with the most that it can take.
    """

    calls: int | None = None
    tokens: int | None = None
    usd: float | None = None
    prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Model -> dollars for a million tokens in and out; a model that is not named costs nothing."""

    def __post_init__(self) -> None:
        self.sent = 0
        self._earlier_calls = 0
        self._tokens, self._usd = 0, 0.0
        self._held: dict[str, tuple[int, float]] = {}
        self._settled = asyncio.Event()
        self._is_started = False

    def start(self, store: ReplyStore) -> None:
        """Called when questions are about to be asked, in their event loop; counts what the store holds once."""
        self._settled = asyncio.Event()
        if self._is_started:
            return
        self._is_started = True
        self._earlier_calls = sum(spent.calls for spent in store.spent.values())
        for model, spent in store.spent.items():
            self._add(model, spent)

    def send(self) -> None:
        """Count a request that is about to leave.

        Raises:
            CallRefused: If it must not.
        """
        if self.calls is not None and self._earlier_calls + self.sent >= self.calls:
            raise CallRefused
        self.sent += 1

    async def reserve(self, key: str, model: str, most: Spent) -> None:
        """Wait until a request that may take `most` fits beside those in flight.

        Raises:
            BudgetReached: If it does not fit with nothing in flight.
        """
        dollars = self.dollars(model, most)
        while not self._fits(most.tokens, dollars):
            if not self._held:
                raise BudgetReached(self.message())
            self._settled.clear()
            await self._settled.wait()
        self._held[key] = (most.tokens, dollars)

    def settle(self, key: str, model: str, spent: Spent | None) -> None:
        """A request of `reserve` came back, with what the endpoint reports; None where it failed."""
        self._held.pop(key, None)
        if spent is not None:
            self._add(model, spent)
        self._settled.set()

    def dollars(self, model: str, spent: Spent) -> float:
        """What the tokens cost."""
        price_in, price_out = self.prices.get(model, (0.0, 0.0))
        return (spent.input_tokens * price_in + spent.output_tokens * price_out) / MILLION

    def message(self) -> str:
        """Which limit was reached, and what to do."""
        limits = {"budget_calls": self.calls, "budget_tokens": self.tokens, "budget_usd": self.usd}
        named = ", ".join(f"`{key}` {value:g}" for key, value in limits.items() if value is not None)
        return (
            f"the budget is reached: {self._earlier_calls + self.sent} calls, {self._tokens} tokens, "
            f"${self._usd:.4f} of {named}; every reply is kept: raise the limit and run the same command again"
        )

    def _add(self, model: str, spent: Spent) -> None:
        self._tokens += spent.tokens
        self._usd += self.dollars(model, spent)

    def _fits(self, tokens: int, dollars: float) -> bool:
        tokens += self._tokens + sum(held for held, _ in self._held.values())
        dollars += self._usd + sum(held for _, held in self._held.values())
        return (self.tokens is None or tokens <= self.tokens) and (self.usd is None or dollars <= self.usd)

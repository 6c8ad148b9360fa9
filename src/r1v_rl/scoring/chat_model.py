"""Questions to any OpenAI-compatible model: many at once, retried, each reply kept so that nothing is asked twice."""

import asyncio
import base64
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm.auto import tqdm

from r1v_rl.data.images import image_hash, load_image
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.scoring.budget import Budget, BudgetReached, CallRefused
from r1v_rl.scoring.loader import run_async
from r1v_rl.scoring.replies import ReplyStore, Spent, content_key
from r1v_rl.tracking.redaction import redact
from r1v_rl.types import ImageSource

TOKENS_PER_IMAGE = 4096
DEFAULT_MAX_TOKENS = 4096
EXTRA_TOKENS = 64
"""What a budget holds back for each picture, for a reply without a limit of its own, and for the chat template."""
MAX_FAILURES_IN_A_ROW = 8
"""Questions that fail for good, with no reply in between, after which the model counts as out of reach."""
_BODY_TRIES = 3
_PARAMETERS = ("model", "messages", "stream", "n", "timeout")


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """One user message to a chat model."""

    row_id: str
    """Names the row in messages; not part of what is asked."""
    text: str
    images: tuple[ImageSource, ...] = ()
    """Shown before the text."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Arguments of this request beside, or in place of, the model's own."""


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What came back."""

    text: str | None
    """None where nothing usable came, whatever was tried."""
    error: str = ""


@dataclass
class _Failures:
    in_a_row: int = 0
    """Questions that failed for good since the last reply."""


@dataclass(frozen=True)
class ChatModel:
    """A model behind an OpenAI-compatible endpoint, and how it is asked.

    `openai` itself retries lost connections, timeouts and the statuses 408, 409, 429 and 5xx, with growing pauses, and
    waits as long as a `Retry-After` says. A question that fails for good has an error for a reply, and is asked again
    by the next run; 401, 403, 404, a spent quota and `MAX_FAILURES_IN_A_ROW` end the run at once, nothing lost.
    """

    model: str
    base_url: str | None = None
    """Of the endpoint, up to `/v1`; None is OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; it may be unset where `base_url` is set."""
    concurrency: int = 16
    timeout_s: float = 120.0
    """Deadline of one try."""
    max_retries: int = 5
    parameters: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `chat.completions.create`, such as `temperature` and `max_completion_tokens`."""
    start: Callable[[], str] | None = None
    """Starts the model's server, the first time that there is something to ask, and returns its `base_url`."""
    role: str = "judge"
    """The first part of the recipe keys that name this model."""
    failures: _Failures = field(default_factory=_Failures, repr=False, compare=False)
    """Over all calls of `ask`."""

    def __post_init__(self) -> None:
        if taken := sorted(set(self.parameters) & set(_PARAMETERS)):
            raise RecipeError(f"`{self.role}_kwargs` must not set {', '.join(taken)}: the run sets it itself")
        if self.concurrency < 1 or self.max_retries < 0 or not self.timeout_s > 0:
            raise RecipeError(
                f"`judge_concurrency` must be at least 1, `judge_max_retries` at least 0, `judge_timeout_s` above 0; "
                f"received {self.concurrency}, {self.max_retries}, {self.timeout_s}"
            )
        if self.base_url is None and not os.environ.get(self.api_key_env):
            raise RecipeError(
                f"`{self.role}_model` needs the key of its endpoint in the environment variable {self.api_key_env} "
                f"(`{self.role}_api_key_env`), which is not set; for a server of your own set `{self.role}_base_url`"
            )

    def key(self, question: ChatQuestion) -> str:
        """What a reply is kept under: model, parameters, text and the pixels of the images."""
        images = [image_hash(image) for image in question.images]
        return content_key(self.model, self.parameters | question.parameters, question.text, images)

    def most(self, question: ChatQuestion) -> Spent:
        """More tokens than one request can take: a token of text is a byte at least."""
        given = self.parameters | question.parameters
        limit = given.get("max_completion_tokens") or given.get("max_tokens") or DEFAULT_MAX_TOKENS
        return Spent(1, len(question.text.encode()) + TOKENS_PER_IMAGE * len(question.images) + EXTRA_TOKENS, limit)

    def ask(
        self, questions: Sequence[ChatQuestion], store: ReplyStore, *, label: str, budget: Budget | None = None
    ) -> list[ChatReply]:
        """A reply to each question, in order; kept ones are not asked for again, equal questions are asked once.

        Args:
            label: What the progress bar says.
            budget: What may be spent; None is without limit.

        Raises:
            UserError: If the endpoint refuses, or is out of reach.
            BudgetReached: Before the budget is passed, when every reply that was paid for is kept.
        """
        keys = [self.key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in store}
        failed: dict[str, str] = {}
        with tqdm(total=len(set(keys)), initial=len(set(keys)) - len(missing), desc=label, disable=None) as bar:
            if missing:
                model = self if self.start is None else replace(self, base_url=self.start(), start=None)
                run_async(_Asking(model, store, failed, bar, budget or Budget()).all(missing))
        return [ChatReply(store.get(key), failed.get(key, "")) for key in keys]


class _Asking:
    """One call of `ask`: as many workers as there may be questions in flight."""

    def __init__(self, model: ChatModel, store: ReplyStore, failed: dict[str, str], bar: tqdm, budget: Budget):
        self.model, self.store, self.failed, self.bar, self.budget = model, store, failed, bar, budget
        self.reached: BudgetReached | None = None

    async def all(self, missing: dict[str, ChatQuestion]) -> None:
        import openai  # half a second

        model = self.model
        self.budget.start(self.store)
        todo = iter(missing.items())
        key = os.environ.get(model.api_key_env) or "none"
        async with openai.AsyncOpenAI(
            base_url=model.base_url,
            api_key=key,
            timeout=model.timeout_s,
            max_retries=model.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [self.send]}),
        ) as client:
            workers = [
                asyncio.create_task(self.work(client, todo)) for _ in range(min(model.concurrency, len(missing)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.reached is not None:
            raise self.reached

    async def send(self, _: Any) -> None:
        """Before every request, those that `openai` repeats by itself too."""
        self.budget.send()

    async def work(self, client: Any, todo: Iterator[tuple[str, ChatQuestion]]) -> None:
        for key, question in todo:
            try:
                text, error, spent = await self.within_budget(client, key, question)
            except BudgetReached as reached:
                self.reached = reached
                return
            if text is not None:
                self.store.put((key, text), model=self.model.model, spent=spent)
                self.model.failures.in_a_row = 0
            else:
                self.failed[key] = error
                self.model.failures.in_a_row += 1
                if self.model.failures.in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise UserError(
                        f"{self.where} failed {MAX_FAILURES_IN_A_ROW} times in a row, last at row {question.row_id}: "
                        f"{error}; {len(self.store)} replies are kept: mend it and run the same command again"
                    )
            self.bar.update()
            if self.reached is not None:  # by another worker; this one has finished what it had in flight
                return

    async def within_budget(
        self, client: Any, key: str, question: ChatQuestion
    ) -> tuple[str | None, str, Spent | None]:
        """(text, "", what it took) or (None, what went wrong, None)."""
        name, spent = self.model.model, None
        await self.budget.reserve(key, name, self.model.most(question))
        try:
            text, error, spent = await self.one(client, question)
        except CallRefused:
            raise BudgetReached(self.budget.message()) from None
        finally:
            self.budget.settle(key, name, spent)
        return text, error, spent

    async def one(self, client: Any, question: ChatQuestion) -> tuple[str | None, str, Spent | None]:
        """As `within_budget`, for a request that may be sent."""
        import openai

        error = ""
        for attempt in range(_BODY_TRIES):
            try:
                text, spent = await self.text_of(client, question)
                return text, "", spent
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as refusal:
                raise UserError(
                    f"{self.where} refuses: {redact(str(refusal))}; check `{self.model.role}_base_url`, "
                    f"`{self.model.role}_model` and the key in {self.model.api_key_env}"
                ) from None
            except openai.APIResponseValidationError as fault:
                error = str(fault)
            except openai.OpenAIError as fault:
                if getattr(fault, "code", None) == "insufficient_quota":
                    raise UserError(f"{self.where}: the quota is spent: {redact(str(fault))}") from None
                return None, f"{type(fault).__name__}: {redact(str(fault))}"[:500], None
            except TypeError as fault:
                raise RecipeError(f"`{self.model.role}_kwargs` {self.model.parameters}: {fault}") from fault
            except ValueError as fault:  # a body that is no JSON, or has no text
                error = f"the reply is no chat completion: {fault}"[:500]
            await asyncio.sleep(0.5 * 2**attempt)
        return None, error, None

    async def text_of(self, client: Any, question: ChatQuestion) -> tuple[str, Spent]:
        response = await client.chat.completions.create(
            model=self.model.model, messages=[_message(question)], **self.model.parameters | question.parameters
        )
        choices = getattr(response, "choices", None)
        text = choices[0].message.content if choices and choices[0].message else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"received {json.dumps(str(response))[:200]}")
        usage = getattr(response, "usage", None)
        return text, Spent(1, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)

    @property
    def where(self) -> str:
        return f"the {self.model.role} model {self.model.model} at {redact(self.model.base_url or 'api.openai.com')}"


def _message(question: ChatQuestion) -> dict[str, Any]:
    if not question.images:
        return {"role": "user", "content": question.text}
    blocks: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in question.images
    ]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": question.text}]}


def _data_url(image: ImageSource) -> str:
    buffer = io.BytesIO()
    load_image(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

"""One row of any dataset -> an `Example`: whatever the columns are called, and with an image block for every image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1v_rl.data.images import resolve_image
from r1v_rl.errors import DataError
from r1v_rl.types import Example, ImageSource

PROMPT_COLUMNS = ("prompt", "problem", "question", "query", "messages", "conversations")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "label")
IMAGE_COLUMNS = ("images", "image")
IMAGE_MARK = "<image>"
REWARD_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every reward function is called with; a column of the same name would collide."""

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_IMAGE = {"type": "image"}


@dataclass(frozen=True)
class RowReader:
    """How the rows of one dataset are read."""

    image_root: Path | None = None
    """Where relative image paths start."""
    system_prompt: str | None = None
    prompt_column: str | None = None
    images_without_marks: str = "refuse"
    answer_required: bool = True
    instruction: str | None = None
    """Put after the last question, one space away."""

    def read(self, row: Mapping[str, Any], index: int) -> Example:
        """The row as an example; images stay as they are stored.

        Raises:
            DataError: Naming the row by its id, or by its index where it has none.
        """
        row_id = str(index) if row.get("id") in (None, "") else str(row["id"])
        try:
            return self._read(row, row_id)
        except DataError as error:
            raise DataError(f"row {row_id}: {error}") from error

    def _read(self, row: Mapping[str, Any], row_id: str) -> Example:
        for key in REWARD_KEYWORDS:
            if key in row:
                raise DataError(f"column `{key}` has the name of a reward function's own argument; rename the column")
        prompt = row.get(self.prompt_column) if self.prompt_column else _first(row, PROMPT_COLUMNS)
        if prompt is None:
            wanted = f"`{self.prompt_column}`" if self.prompt_column else f"any of {', '.join(PROMPT_COLUMNS)}"
            raise DataError(
                f"no prompt: it has the columns {', '.join(row)}, not {wanted}; set `dataset_prompt_column`"
            )
        messages, embedded = _read_messages(prompt)
        reply = _drop_reply(messages)
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        if self.instruction:
            _add_instruction(messages, self.instruction)
        images = tuple(resolve_image(source, self.image_root) for source in _as_list(_first(row, IMAGE_COLUMNS)))
        images = images or tuple(resolve_image(source, self.image_root) for source in embedded)
        self._match_marks(messages, images)
        answer = _read_answer(_first(row, ANSWER_COLUMNS), reply)
        if answer is None and self.answer_required:
            raise DataError(f"the answer is empty; fill one of the columns {', '.join(ANSWER_COLUMNS)} or drop the row")
        columns = {key: value for key, value in row.items() if key not in (*IMAGE_COLUMNS, "prompt", "completion")}
        target = _read_target(row.get("completion"), reply)
        columns |= {"id": row_id, "answer": answer} | ({} if target is None else {"completion": target})
        return Example(row_id, messages, images, answer, columns)

    def _match_marks(self, messages: list[dict[str, Any]], images: tuple[ImageSource, ...]) -> None:
        num_marks = sum(block["type"] == "image" for message in messages for block in message["content"])
        if num_marks == len(images):
            return
        if num_marks == 0 and self.images_without_marks == "prepend":
            first_user = next(message for message in messages if message["role"] == "user")
            first_user["content"] = [dict(_IMAGE) for _ in images] + first_user["content"]
            return
        hint = ""
        if num_marks == 0:
            hint = "; or set `images_without_marks: prepend` to put the images before the text"
        if not images:
            hint = "; where the text means the word itself, write it differently"
        raise DataError(
            f"{num_marks} `{IMAGE_MARK}` mark(s) in the prompt and {len(images)} image(s); write one mark where each "
            f"image goes{hint}"
        )


def _add_instruction(messages: list[dict[str, Any]], instruction: str) -> None:
    content = messages[-1]["content"]
    if content and content[-1]["type"] == "text":
        content[-1] = {"type": "text", "text": f"{content[-1]['text'].rstrip()} {instruction}"}
    else:
        content.append({"type": "text", "text": instruction})


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_messages(prompt: Any) -> tuple[list[dict[str, Any]], list[ImageSource]]:
    """Chat messages with content blocks, and the images that blocks themselves carry."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple) or not all(isinstance(message, Mapping) for message in prompt):
        raise DataError(f"the prompt must be text or a list of messages, received {type(prompt).__name__}")
    messages: list[dict[str, Any]] = []
    embedded: list[ImageSource] = []
    for message in prompt:
        role = message.get("role") or message.get("from")
        if role not in _ROLES:
            raise DataError(f"a message has the role {role!r}; known are {', '.join(_ROLES)}")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        messages.append({"role": _ROLES[role], "content": _read_content(content, embedded)})
    return messages, embedded


def _read_content(content: Any, embedded: list[ImageSource]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return split_at_marks(content)
    if not isinstance(content, list | tuple):
        raise DataError(f"a message's content must be text or a list of blocks, received {type(content).__name__}")
    blocks: list[dict[str, Any]] = []
    for block in content:
        kind = "text" if isinstance(block, str) else block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            blocks += split_at_marks(block if isinstance(block, str) else block.get("text") or "")
        elif kind in ("image", "image_url"):
            blocks.append(dict(_IMAGE))
            source = _first(block, ("image", "image_url", "path", "url"))
            if isinstance(source, Mapping) and source.get("url") is not None:
                source = source["url"]
            embedded += [] if source is None else [source]
        else:
            raise DataError(f"a content block must be of type text or image, received {kind!r}")
    return blocks


def split_at_marks(text: str) -> list[dict[str, Any]]:
    """`"a <image> b"` -> text, image, text."""
    blocks: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            blocks.append(dict(_IMAGE))
        if piece:
            blocks.append({"type": "text", "text": piece})
    return blocks


def _drop_reply(messages: list[dict[str, Any]]) -> str | None:
    """Remove the assistant's turns at the end, which the model is to write itself; returns the text of the last one."""
    reply = None
    while messages and messages[-1]["role"] == "assistant":
        text = "".join(block.get("text", "") for block in messages.pop()["content"])
        reply = text if reply is None else reply
    if not messages or messages[-1]["role"] != "user":
        raise DataError("the prompt is empty: it must end with a message of the user")
    if not any(block["type"] == "image" or block["text"].strip() for block in messages[-1]["content"]):
        raise DataError("the prompt is empty; write a problem or drop the row")
    return reply


def _read_target(completion: Any, reply: str | None) -> str | None:
    """What the assistant is to write: the column `completion` (text or messages), else the conversation's last turn."""
    if isinstance(completion, list | tuple) and completion and isinstance(completion[-1], Mapping):
        if len(completion) > 1:
            raise DataError(f"`completion` holds {len(completion)} messages; it must be one of the assistant, or text")
        content = completion[-1].get("content")
        completion = (
            content if isinstance(content, str) else "".join(block.get("text") or "" for block in content or [])
        )
    if completion is None:
        return reply
    if not isinstance(completion, str):
        raise DataError(f"`completion` must be text or one message, received {type(completion).__name__}")
    return completion


def _read_answer(value: Any, reply: str | None) -> str | None:
    """The answer column as text, or else the reply that the row's conversation ends with; None where both are empty."""
    value = reply if value is None else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | bool | int | float):
        raise DataError(f"the answer must be text or a number, received {type(value).__name__}")
    return str(value) if str(value).strip() else None

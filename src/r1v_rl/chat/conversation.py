"""A conversation with pictures: what was said, what is asked next, and whether it fits."""

from typing import Any

from r1v_rl.data.chat import prompt_token_counter
from r1v_rl.data.images import check_image, load_image
from r1v_rl.data.rows import IMAGE_MARK, split_at_marks
from r1v_rl.errors import DataError
from r1v_rl.rollout.prompts import EncodedPrompt, encode_prompt
from r1v_rl.types import Example, ImageSource


class Conversation:
    """Turns are kept as the model sees them: of its own answers without the thinking, as reasoning models' chat
    templates do.

    Args:
        processor: Of the model.
        context: Most tokens, the pictures' included.
        max_images: Most pictures.
    """

    def __init__(self, processor: Any, *, context: int, max_images: int, system_prompt: str | None = None):
        self._processor = processor
        self._context = context
        self._max_images = max_images
        self._system = [_message("system", system_prompt)] if system_prompt else []
        self._count = prompt_token_counter(processor)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = list(self._system)
        self._images: list[ImageSource] = []
        self._attached: list[ImageSource] = []

    def attach(self, path: str) -> None:
        """A picture of the next question.

        Raises:
            DataError: If it is not there, damaged, too large, or one too many.
        """
        if len(self._images) + len(self._attached) >= self._max_images:
            raise DataError(
                f"image {path} is one too many: a conversation may hold {self._max_images} (`--max_images`)"
            )
        check_image(path, row_id=None)
        self._attached.append(load_image(path))

    def ask(self, question: str) -> tuple[EncodedPrompt, int]:
        """The prompt with this question at its end, and the tokens that the context has left for an answer.

        Raises:
            DataError: If the question is empty, its marks do not fit the pictures, or the context is too short.
        """
        turn = {"role": "user", "content": self._content(question)}
        example = Example("question", [*self._messages, turn], (*self._images, *self._attached), None)
        num_tokens = self._count(example)
        if num_tokens >= self._context:
            raise DataError(
                f"the conversation has {num_tokens} tokens with its {len(example.images)} picture(s), and the context "
                f"holds {self._context} and an answer too: ask for less, with fewer pictures or fewer tiles of each "
                f"(`--max_image_tiles`)"
            )
        return encode_prompt(self._processor, example, device="cpu"), self._context - num_tokens

    def answered(self, prompt: EncodedPrompt, answer: str) -> None:
        """Keep the question of `prompt`, with its pictures, and what was answered."""
        self._messages = [*prompt.example.messages, _message("assistant", answer)]
        self._images, self._attached = list(prompt.example.images), []

    def _content(self, question: str) -> list[dict[str, str]]:
        if not question.strip():
            raise DataError("the question is empty")
        if self._processor.image_token in question:
            raise DataError(f"a picture's place is marked by {IMAGE_MARK}, not by {self._processor.image_token}")
        blocks = split_at_marks(question)
        num_marks, num_images = sum(block["type"] == "image" for block in blocks), len(self._attached)
        if num_marks == 0:
            return [{"type": "image"} for _ in self._attached] + blocks
        if num_marks != num_images:
            raise DataError(
                f"the question has {num_marks} {IMAGE_MARK} mark(s) for {num_images} picture(s): write one for each, "
                f"or none at all"
            )
        return blocks


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}

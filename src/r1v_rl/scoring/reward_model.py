"""A sequence classification model as the `reward_model` reward, or as a scorer whose scalars become 0 to 5."""

import gc
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoProcessor

from r1v_rl.data.images import image_hash, load_image
from r1v_rl.errors import RecipeError, RewardError, UserError
from r1v_rl.models.weight_files import load_weights
from r1v_rl.scoring.format import with_prompt_think
from r1v_rl.scoring.judge_config import WorkedAnswer
from r1v_rl.scoring.replies import ReplyStore, content_key
from r1v_rl.scoring.rules import Reward, RewardSettings, completion_text, per_completion
from r1v_rl.scoring.scorer_config import Score, ScorerConfig

Conversation = tuple[list[dict[str, Any]], Sequence[Any]]
"""Messages, the answer last, and the pictures of their image blocks."""
Key = TypeVar("Key")


def scores_of(
    rewards: Sequence[float], *, thresholds: Sequence[float] | None = None, quantiles: Sequence[float] | None = None
) -> list[int]:
    """The number of thresholds that each reward reaches; `quantiles` are turned into thresholds over these rewards."""
    if thresholds is None:
        assert quantiles is not None
        thresholds = numpy.quantile(rewards, quantiles).tolist() if len(rewards) else []
    return [bisect_right(thresholds, reward) for reward in rewards]


class RewardModelScorer:
    """A sequence classification model with one output; it is loaded for the answers that have no reward yet, and let
    go of afterwards."""

    def __init__(self, config: ScorerConfig):
        self._config = config

    def __call__(self, answers: Sequence[WorkedAnswer], store: ReplyStore) -> list[Score]:
        keys = [self._key(answer) for answer in answers]
        missing = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in store}
        if missing:
            self._reward(missing, store)
        config = self._config
        rewards = [store.get(key) for key in keys]
        scores = scores_of(rewards, thresholds=config.reward_model_thresholds, quantiles=config.reward_model_quantiles)
        return [Score(value) for value in scores]

    def _key(self, answer: WorkedAnswer) -> str:
        images = [image_hash(image) for image in answer.example.images]
        return content_key("reward", self._config.reward_model, answer.example.messages, images, answer.response)

    def _reward(self, missing: dict[str, WorkedAnswer], store: ReplyStore) -> None:
        model, processor = load_reward_model(self._config.reward_model, self._config.reward_model_dtype)
        todo = sorted(missing, key=lambda key: bool(missing[key].example.images))  # no batch mixes the two kinds
        with tqdm(total=len(todo), desc="scoring", disable=None) as bar:
            conversations = [(key, _conversation(missing[key])) for key in todo]
            for batch in _batches(conversations, self._config.reward_model_batch_size):
                rewards = _rewards(model, processor, [conversation for _, conversation in batch])
                for (key, _), reward in zip(batch, rewards, strict=True):
                    if not numpy.isfinite(reward):
                        row = missing[key].example.id
                        raise UserError(
                            f"the reward model {self._config.reward_model} gives {reward} for row {row}; "
                            f"try `reward_model_dtype: float32`"
                        )
                store.put(*[(key, reward) for (key, _), reward in zip(batch, rewards, strict=True)])
                bar.update(len(batch))
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _conversation(answer: WorkedAnswer) -> Conversation:
    return [*answer.example.messages, {"role": "assistant", "content": answer.response}], answer.example.images


def reward_model_reward(settings: RewardSettings) -> Reward:
    """The scalar that a sequence classification model gives each completion in its conversation, pictures included
    where its processor takes them; the `<think>` that a prompt opened is put back. A batch is of one prompt: a scalar
    must not depend, not by rounding either, on what else is judged in a call.

    Raises:
        RewardError: If no model is named.
        RecipeError: If the model cannot be read or has several outputs.
    """
    if not settings.reward_model:
        raise RewardError(
            "the reward_model reward needs `reward_model`: a folder or hub id of a sequence classification model"
        )
    model, processor = load_reward_model(settings.reward_model, settings.reward_model_dtype)

    @per_completion
    def reward_model(
        completions: Sequence[Any],
        prompts: Sequence[Any],
        images: Sequence[Sequence[Any]] | None = None,
        id: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        shown: list[Conversation] = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = with_prompt_think(completion_text(completion), settings.prompt_opens_think)
            shown.append(([*turns, {"role": "assistant", "content": text}], () if images is None else images[row]))
        rewards: list[float | None] = []
        for _prompt, rows in groupby(range(len(shown)), key=(prompts if id is None else id).__getitem__):
            for batch in _batches([(row, shown[row]) for row in rows], settings.reward_model_batch_size):
                rewards += _rewards(model, processor, [conversation for _, conversation in batch])
        return rewards

    return reward_model


def load_reward_model(path: str | None, dtype: str) -> tuple[Any, Any]:
    """Model and processor, on the GPU where there is one.

    Raises:
        RecipeError: If it cannot be read, or has several outputs.
    """
    try:
        model = load_weights(AutoModelForSequenceClassification, str(path), dtype=dtype)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`reward_model` must be a sequence classification model with its tokenizer or processor; {path} "
            f"cannot be read: {error}"
        ) from error
    if model.config.num_labels != 1:
        raise RecipeError(f"`reward_model` must have one output, a scalar; {path} has {model.config.num_labels}")
    tokenizer = getattr(processor, "tokenizer", processor)
    if model.config.get_text_config().pad_token_id is None:  # the last token of a padded row is found by it
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor


def _batches(items: list[tuple[Key, Conversation]], batch_size: int) -> Iterator[list[tuple[Key, Conversation]]]:
    for _, same_kind in groupby(items, key=lambda item: bool(item[1][1])):
        rows = list(same_kind)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


@torch.inference_mode()
def _rewards(model: Any, processor: Any, conversations: Sequence[Conversation]) -> list[float]:
    """One scalar each. A text model is shown the text alone: its tokenizer has no place for pictures."""
    sees_images = hasattr(processor, "image_processor")
    texts, images = [], []
    for messages, pictures in conversations:
        shown = [{**m, "content": _blocks(m["content"]) if sees_images else _text(m["content"])} for m in messages]
        texts.append(processor.apply_chat_template(shown, tokenize=False))
        images.append([load_image(source) for source in pictures])
    given = {"images": images} if sees_images and images[0] else {}
    inputs = processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt", **given)
    return model(**inputs.to(model.device)).logits.float().squeeze(-1).tolist()


def _blocks(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] for block in content if block["type"] == "text")

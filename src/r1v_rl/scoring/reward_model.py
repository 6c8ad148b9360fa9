"""A reward model as a scorer: one scalar a worked answer, text or pictures, mapped to 0..5 by the recipe's steps."""

import gc
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoProcessor

from r1v_rl.data.images import image_hash, load_image
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.scoring.replies import ReplyStore, content_key
from r1v_rl.scoring.scorers import Score, ScorerConfig, WorkedAnswer


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
        model, processor = self._load()
        todo = sorted(missing.items(), key=lambda item: bool(item[1].example.images))  # no batch mixes the two kinds
        with tqdm(total=len(todo), desc="scoring", disable=None) as bar:
            for batch in _batches(todo, self._config.reward_model_batch_size):
                rewards = _rewards(model, processor, [answer for _, answer in batch])
                for (_, answer), reward in zip(batch, rewards, strict=True):
                    if not numpy.isfinite(reward):
                        raise UserError(
                            f"the reward model {self._config.reward_model} gives {reward} for row {answer.example.id}; "
                            f"try `reward_model_dtype: float32`"
                        )
                store.put(*[(key, reward) for (key, _), reward in zip(batch, rewards, strict=True)])
                bar.update(len(batch))
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> tuple[Any, Any]:
        path, dtype = self._config.reward_model, self._config.reward_model_dtype
        try:
            model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
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


def _batches(items: list[tuple[str, WorkedAnswer]], batch_size: int) -> Iterator[list[tuple[str, WorkedAnswer]]]:
    for _, same_kind in groupby(items, key=lambda item: bool(item[1].example.images)):
        rows = list(same_kind)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


@torch.inference_mode()
def _rewards(model: Any, processor: Any, answers: Sequence[WorkedAnswer]) -> list[float]:
    """One scalar each. A text model is shown the text alone: its tokenizer has no place for pictures."""
    sees_images = hasattr(processor, "image_processor")
    texts, images = [], []
    for answer in answers:
        messages = [*answer.example.messages, {"role": "assistant", "content": _block(answer.response)}]
        shown = messages if sees_images else [{**m, "content": _text(m["content"])} for m in messages]
        texts.append(processor.apply_chat_template(shown, tokenize=False))
        images.append([load_image(source) for source in answer.example.images])
    pictures = {"images": images} if sees_images and images[0] else {}
    inputs = processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt", **pictures)
    return model(**inputs.to(model.device)).logits.float().squeeze(-1).tolist()


def _block(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _text(blocks: list[dict[str, str]]) -> str:
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")

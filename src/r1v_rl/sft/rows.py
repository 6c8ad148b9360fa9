"""Rows as token ids: prompt, pictures' placeholders and target, counted before anything trains."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor
from tqdm.auto import tqdm

from r1v_rl.data.chat import prompt_text
from r1v_rl.data.images import image_size, load_image
from r1v_rl.data.sources import shown_faults
from r1v_rl.errors import DataError
from r1v_rl.models.visual_tokens import VisualTokens
from r1v_rl.types import Example

Ids = numpy.ndarray
_CHUNK = 256
_THINK = "<think>"


class TargetRows:
    """The samples of a run: token ids in memory, pictures read from their source when they are asked for.

    Args:
        examples: As `load_examples` gives them.
        processor: Its chat template, tokenizer and image processor are used.
        max_length: Longest row in tokens, visual ones included; None = any.
        filter_overlong: Leave longer rows out (and say how many) instead of refusing them.
        template_kwargs: Further arguments of the chat template.

    Raises:
        DataError: The first rows by their ids that have no target, or are too long.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Any,
        *,
        max_length: int | None = None,
        filter_overlong: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self._examples, self._processor = examples, processor
        self._template_kwargs = template_kwargs
        self._visual = VisualTokens(processor)
        self._image_ids: dict[Any, int] = {}
        self.places: list[tuple[int, int]] = []
        """For each picture, the example that holds it and its number there; a path shared by rows is one picture."""
        self.sizes: list[tuple[int, int]] = []
        """For each picture, (width, height)."""
        self.indices: list[int] = []
        """For each sample, its example."""
        self.prompts: list[Ids] = []
        """For each sample the prompt's ids, one placeholder for each picture."""
        self.completions: list[Ids] = []
        self.images: list[tuple[int, ...]] = []
        """For each sample its pictures."""
        self.lengths: list[int] = []
        """For each sample its tokens, visual ones included."""
        self._read(max_length, filter_overlong)

    def __len__(self) -> int:
        return len(self.indices)

    def ids(self, sample: int) -> tuple[list[int], int]:
        """The sample's token ids with every picture's placeholder spelled out, and how many of them are the prompt."""
        runs = [self._visual.ids(self.sizes[image]) for image in self.images[sample]]
        prompt = self._visual.expand(self.prompts[sample].tolist(), runs)
        return prompt + self.completions[sample].tolist(), len(prompt)

    def num_tiles(self, image: int) -> int:
        """Tiles that the picture is cut into."""
        return self._visual.num_tiles(self.sizes[image])

    def vision_inputs(self, images: Sequence[int]) -> dict[str, Tensor]:
        """What the vision encoder reads of these pictures, all tiles in order."""
        if not images:
            return {}
        places = [self.places[image] for image in images]
        pictures = [load_image(self._examples[example].images[number]) for example, number in places]
        return self._visual.pixels(pictures)

    def data_hash(self) -> str:
        """A hash of ids, prompts, targets and the pictures' sizes."""
        digest = hashlib.sha256()
        for sample, index in enumerate(self.indices):
            digest.update(f"{self._examples[index].id}\0{[self.sizes[i] for i in self.images[sample]]}".encode())
            digest.update(self.prompts[sample].tobytes() + b"|" + self.completions[sample].tobytes())
        return digest.hexdigest()

    # ---- reading --------------------------------------------------------------------------------------------------

    def _read(self, max_length: int | None, filter_overlong: bool) -> None:
        faults: list[str] = []
        overlong: list[str] = []
        with tqdm(total=len(self._examples), desc="tokenizing", unit="row", disable=None, mininterval=1) as bar:
            for start in range(0, len(self._examples), _CHUNK):
                chunk = self._examples[start : start + _CHUNK]
                texts = [self._texts(example, faults) for example in chunk]
                kept = [(start + i, text) for i, text in enumerate(texts) if text is not None]
                for index, prompt, completion in self._tokenized(kept):
                    example = chunk[index - start]
                    self._add(index, example, prompt, completion)
                    if max_length is not None and self.lengths[-1] > max_length:
                        overlong.append(f"row {example.id} has {self.lengths[-1]} tokens")
                        self._drop_last()
                bar.update(len(chunk))
        if overlong and not filter_overlong:
            faults += [f"{row}, `max_length` is {max_length}" for row in overlong]
        if faults:
            hint = ""
            if overlong and not filter_overlong:
                hint = (
                    "\nrows are never cut: raise `max_length`, lower `max_image_tiles`, or leave such rows out with "
                    "`filter_overlong_rows: true`"
                )
            raise DataError(f"{len(faults)} row(s) cannot be used\n{shown_faults(faults)}{hint}")
        if overlong:
            share = 100 * len(overlong) / len(self._examples)
            print(f"left out {len(overlong)} rows ({share:.1f} %) of more than {max_length} tokens: {overlong[0]}, ...")
        if not self.indices:
            raise DataError(f"no row is left: all are longer than `max_length` {max_length}")

    def _texts(self, example: Example, faults: list[str]) -> tuple[str, str] | None:
        """Prompt and target as text; None, and a fault, where a row has none."""
        target = example.columns.get("completion")
        if not target or not target.strip():
            faults.append(
                f"row {example.id}: it has no target text; fill the column `completion`, or end its messages with a "
                f"turn of the assistant (`scenes`: set `dataset_kwargs: {{chains: mixed}}`)"
            )
            return None
        try:
            prompt = prompt_text(self._processor, example, self._template_kwargs)
        except DataError as error:
            faults.append(str(error))
            return None
        if self._processor.image_token in target:
            faults.append(f"row {example.id}: its target spells the image placeholder {self._processor.image_token!r}")
            return None
        if prompt.rstrip().endswith(_THINK) and target.lstrip().startswith(_THINK):
            target = target.lstrip().removeprefix(_THINK).lstrip("\n")  # the prompt has opened it
        end = self._processor.tokenizer.eos_token
        return prompt, target if target.endswith(end) else target + end

    def _tokenized(self, texts: list[tuple[int, tuple[str, str]]]) -> Iterator[tuple[int, Ids, Ids]]:
        """(example, prompt ids, target ids) of each."""
        if not texts:
            return
        tokenizer = self._processor.tokenizer
        prompts = tokenizer([prompt for _, (prompt, _) in texts], add_special_tokens=False)["input_ids"]
        targets = tokenizer([target for _, (_, target) in texts], add_special_tokens=False)["input_ids"]
        for (index, _), prompt, target in zip(texts, prompts, targets, strict=True):
            yield index, numpy.array(prompt, dtype=numpy.int32), numpy.array(target, dtype=numpy.int32)

    def _add(self, index: int, example: Example, prompt: Ids, completion: Ids) -> None:
        images = tuple(self._image(source, index, number) for number, source in enumerate(example.images))
        visual = sum(len(self._visual.ids(self.sizes[image])) - 1 for image in images)
        self.indices.append(index)
        self.prompts.append(prompt)
        self.completions.append(completion)
        self.images.append(images)
        self.lengths.append(len(prompt) + visual + len(completion))

    def _drop_last(self) -> None:
        for column in (self.indices, self.prompts, self.completions, self.images, self.lengths):
            column.pop()

    def _image(self, source: Any, index: int, number: int) -> int:
        key = str(source) if isinstance(source, str | Path) else (index, number)
        if key not in self._image_ids:
            self._image_ids[key] = len(self.places)
            self.places.append((index, number))
            self.sizes.append(image_size(source))
        return self._image_ids[key]

"""Alignment trains the projector and nothing else, on completions and nothing else."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from r1v_rl.config import build_configs, read_recipe
from r1v_rl.data.scene_lessons import scene_lessons
from r1v_rl.errors import RecipeError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.parts import part_of
from r1v_rl.sft.alignment import IGNORED, AlignmentConfig, CompletionCollator, align
from r1v_rl.tiny.parts import resolve_part

RECIPE = "recipes/tiny/align.yaml"


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    arguments = ["--config", RECIPE, "--max_steps", "6", "--output_dir", str(folder), "--logging_steps", "1"]
    arguments += ["--per_device_train_batch_size", "8", "--warmup_steps", "0"]
    (config,) = build_configs((AlignmentConfig,), read_recipe((AlignmentConfig,), arguments))
    return folder, align(config)


def test_only_the_projector_moves_and_the_loss_falls(aligned, tmp_path):
    folder, trainer = aligned
    parts = resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm")
    before = compose_vlm(*parts, tmp_path, seed=trainer.args.seed).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == {"projector"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_labels_are_the_completions_with_their_end(aligned):
    folder, _ = aligned
    processor = AutoProcessor.from_pretrained(folder)
    rows = [scene_lessons("train", 6, 0)[i] for i in range(6)]
    batch = CompletionCollator(processor)(rows)
    assert batch["pixel_values"].shape[0] == sum(len(row["images"]) for row in rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        assert processor.tokenizer.decode(labels[labels != IGNORED]) == row["completion"] + "<|im_end|>"
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        assert int((ids == processor.image_token_id).sum()) == 9 * len(row["images"])


def test_padding_changes_no_rows_loss(aligned):
    folder, _ = aligned
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    rows = [scene_lessons("train", 4, 1)[i] for i in range(4)]
    collate = CompletionCollator(processor)
    with torch.no_grad():
        batch = collate(rows)
        count = (batch["labels"] != IGNORED).sum()
        alone = [(model(**one).loss, (one["labels"] != IGNORED).sum()) for one in (collate([row]) for row in rows)]
        expected = sum(loss * tokens for loss, tokens in alone) / count
        assert model(**batch).loss == pytest.approx(expected.item(), rel=1e-5)


def test_missing_parts_are_named(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--vision_encoder", "tiny/vision_encoder", "--use_cpu", "true"]
    arguments += ["--bf16", "false", "--max_steps", "1"]
    (config,) = build_configs((AlignmentConfig,), read_recipe((AlignmentConfig,), arguments))
    with pytest.raises(RecipeError, match="language_model"):
        align(config)

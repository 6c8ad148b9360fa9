"""Packed rows give the loss and the gradients of unpacked ones; the loss is on the targets and nothing else."""

import pytest
import torch
from random_vlm import picture, random_vlm
from sft.tiny_sft import ROWS, make_trainer
from transformers import AutoModelForImageTextToText

from r1v_rl.models.packing import PackedLayout
from r1v_rl.models.parts import PARTS

ALL = list(PARTS)


@pytest.fixture()
def parts():
    model, processor = random_vlm()
    return model.train(), processor


def loss_and_gradients(trainer, batches):
    """Of one optimizer step over these micro-batches."""
    trainer.model.zero_grad()
    total = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)
        part.backward()
        loss += part.item()
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def batches_of(parts, tmp_path, **changes):
    model, processor = parts
    trainer = make_trainer(model, tmp_path, processor=processor, trainable=ALL, **changes)
    return trainer, list(trainer.get_train_dataloader())


def close(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        error = (gradient - other[1][name]).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("weighting", ["token", "sqrt_length"])
def test_packed_rows_equal_unpacked_ones(tmp_path, weighting):
    """Ten samples packed into rows, the same in one sequence, padded, and one by one."""
    results = []
    for changes in (
        {"packing": True, "max_length": 160},
        {"packing": False, "padding_free": True, "per_device_train_batch_size": 10},
        {"packing": False, "per_device_train_batch_size": 10},
        {"packing": False, "per_device_train_batch_size": 1},
    ):
        trainer, batches = batches_of(random_vlm(), tmp_path, loss_weighting=weighting, **changes)
        assert sum(batch["num_samples"] for batch in batches) == len(ROWS)
        results.append(loss_and_gradients(trainer, batches))
    for other in results[1:]:
        close(results[0], other)
    assert {name for name, gradient in results[0][1].items() if gradient.abs().max() > 0}


def test_the_loss_is_what_transformers_computes_from_labels(tmp_path, parts):
    """Token weighting: the mean over all target tokens of the model's own cross-entropy, row by row."""
    trainer, batches = batches_of(parts, tmp_path, packing=True)
    loss, _ = loss_and_gradients(trainer, batches)
    plain, _ = random_vlm()
    total, count = 0.0, 0
    rows = trainer._train_rows
    for sample in range(len(rows)):
        ids, num_prompt = rows.ids(sample)
        labels = torch.tensor([[-100] * num_prompt + ids[num_prompt:]])
        with torch.no_grad():
            out = plain(input_ids=torch.tensor([ids]), labels=labels, **rows.vision_inputs(rows.images[sample]))
        total += out.loss.item() * (len(ids) - num_prompt)
        count += len(ids) - num_prompt
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_square_root_weights(tmp_path, parts):
    """Each sample has sqrt(tokens) votes, whatever it shares a row with."""
    trainer, batches = batches_of(parts, tmp_path, loss_weighting="sqrt_length")
    weights = torch.cat([batch["weights"] for batch in batches])
    lengths = [len(c) for c in trainer._train_rows.completions]
    assert weights.sum().item() == pytest.approx(sum(n**0.5 for n in lengths), rel=1e-5)
    loss = trainer.compute_loss(trainer.model, batches[0])
    other = trainer.compute_loss(trainer.model, {**batches[0], "weights": torch.ones_like(batches[0]["weights"])})
    assert loss.item() != pytest.approx(other.item(), rel=1e-3)


def test_attention_across_samples_would_be_seen(tmp_path, parts, monkeypatch):
    """The same comparison fails where samples see each other, and where positions do not restart."""
    trainer, batches = batches_of(parts, tmp_path, packing=True)
    right = loss_and_gradients(trainer, batches)

    def one_segment(layout, *arguments):
        return original(PackedLayout.of([layout.num_tokens]), *arguments)

    def running_positions(layout, *arguments):
        return original(layout, *arguments) | {"position_ids": torch.arange(layout.num_tokens)[None]}

    original = PackedLayout.forward_kwargs
    for planted in (one_segment, running_positions):
        monkeypatch.setattr(PackedLayout, "forward_kwargs", planted)
        wrong = loss_and_gradients(trainer, batches)
        monkeypatch.setattr(PackedLayout, "forward_kwargs", original)
        if planted is running_positions:  # rotary positions are relative: a shift within a segment changes nothing
            close(right, wrong)
        else:
            with pytest.raises(AssertionError):
                close(right, wrong)


@pytest.mark.parametrize("changes", [{"packing": True}, {"packing": False, "padding_free": True}, {"packing": False}])
def test_targets_are_the_completions_with_their_end(tmp_path, parts, changes):
    trainer, batches = batches_of(parts, tmp_path, **changes)
    tokenizer = trainer.processing_class.tokenizer
    found = []
    for batch in batches:
        flat = batch["input_ids"].flatten()
        assert torch.equal(flat[batch["positions"] + 1], batch["targets"]), "each position stands before its target"
        found.append(tokenizer.decode(batch["targets"]))
    end = tokenizer.eos_token
    expected = sorted(row["completion"] for row in ROWS)
    assert sorted(text for texts in found for text in texts.split(end) if text) == expected
    assert all((batch["targets"] != trainer.processing_class.image_token_id).all() for batch in batches)


def test_pictures_that_rows_share_are_read_once(tmp_path, parts):
    """Two files of three tiles and one, in rows that show both, in either order, or one of them."""
    files = {"wide": picture(3, 64, 32), "square": picture(4)}
    for name, image in files.items():
        image.save(tmp_path / f"{name}.png")
    shown = [["wide", "square"], ["square", "wide"], ["square"]]
    rows = [{**row, "id": str(i)} for i, row in enumerate(ROWS[: len(shown)])]
    by_path = [
        row | {"images": [str(tmp_path / f"{n}.png") for n in names]} for row, names in zip(rows, shown, strict=True)
    ]
    copies = [row | {"images": [files[n] for n in names]} for row, names in zip(rows, shown, strict=True)]
    changes = {"packing": False, "padding_free": True, "per_device_train_batch_size": 3}
    shared, (batch,) = batches_of(parts, tmp_path, rows=by_path, **changes)
    separate, (other,) = batches_of(random_vlm(), tmp_path, rows=copies, **changes)
    assert (len(batch["pixel_values"]), len(other["pixel_values"])) == (4, 9)
    close(loss_and_gradients(shared, [batch]), loss_and_gradients(separate, [other]))


def test_rows_without_a_picture_where_the_projector_alone_trains(tmp_path, parts):
    """No gradient reaches the projector: it is zero, and the run goes on."""
    model, processor = parts
    rows = [row for row in ROWS if not row["images"]]
    trainer = make_trainer(model, tmp_path, rows=rows, processor=processor, trainable=["projector"], max_steps=1)
    _, gradients = loss_and_gradients(trainer, list(trainer.get_train_dataloader()))
    assert gradients and all((gradient == 0).all() for gradient in gradients.values())


def test_gradient_checkpointing_changes_nothing(tmp_path, parts):
    trainer, batches = batches_of(parts, tmp_path)
    plain = loss_and_gradients(trainer, batches)
    trainer.model.gradient_checkpointing_enable()
    assert trainer.model.is_gradient_checkpointing
    close(plain, loss_and_gradients(trainer, batches))


def test_one_update_of_the_trainer_is_one_of_trls(tmp_path):
    """The same rows through `trl.SFTTrainer`, its collator and its optimizer: the same weights after three steps."""
    import trl
    from datasets import Dataset

    model, processor = random_vlm()
    images = [row["images"] for row in ROWS]
    prompts = [[{"role": "user", "content": row["prompt"][0]["content"]}] for row in ROWS]
    answers = [[{"role": "assistant", "content": row["completion"]}] for row in ROWS]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * len(i) + [{"type": "text", "text": p[0]["content"]}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for p, i in zip(prompts, images, strict=True)
    ]
    ends = [a[0]["content"] + processor.tokenizer.eos_token for a in answers]
    dataset = Dataset.from_dict({"prompt": texts, "completion": ends, "images": images})
    settings = {
        "per_device_train_batch_size": 10, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "use_cpu": True, "max_length": None,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    theirs = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **settings),
        train_dataset=dataset,
        processing_class=processor,
    )
    theirs.train()
    ours = make_trainer(
        random_vlm()[0], tmp_path, processor=processor, trainable=ALL, packing=False, padding_free=True, **settings
    )
    ours.train()
    logged = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (theirs, ours)]
    for name, weight in theirs.model.named_parameters():
        assert torch.allclose(weight, ours.model.get_parameter(name), atol=2e-5), name
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_the_saved_model_is_a_plain_one(tmp_path, parts):
    model, processor = parts
    trainer = make_trainer(model, tmp_path, processor=processor, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert loaded.config._attn_implementation == "sdpa"
    assert all(torch.equal(w, loaded.state_dict()[n]) for n, w in trainer.model.state_dict().items())
    assert not (tmp_path / "out" / "training_args.bin").exists()

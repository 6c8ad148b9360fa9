"""The commands `align` and `sft`: any rows with a target, what is refused, and the folder that is left."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from random_vlm import picture, save_random_vlm
from transformers import AutoModelForImageTextToText

from r1v_rl import checkpoints
from r1v_rl.cli import main
from r1v_rl.data.dataset import examples_from_rows, load_examples
from r1v_rl.data.scene_lessons import CHAINS
from r1v_rl.errors import DataError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.parts import part_of
from r1v_rl.sft.rows import TargetRows
from r1v_rl.tiny.parts import resolve_part

CPU = ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
PLAIN = [*CPU, "--logging_steps", "1", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and rows of three kinds: a `completion` column, a conversation that ends with a reply, messages."""
    folder = tmp_path_factory.mktemp("sft")
    save_random_vlm(folder / "model")
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    question = {"role": "user", "content": "<image> How many red circles?"}
    reply = {"role": "assistant", "content": "<think>\nLook</think>\n\\boxed{2}"}
    rows = [
        {"id": "a", "problem": "<image> How many?", "answer": "1", "images": ["0.png"], "completion": "\\boxed{1}"},
        {"id": "b", "messages": [question, reply], "images": ["1.png"]},
        {"id": "c", "messages": [{"role": "user", "content": "How many?"}], "completion": [reply]},
        {"id": "d", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "4"}],
         "image": "2.png"},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def processor_of(folder):
    from r1v_rl.data.chat import load_processor

    return load_processor(str(folder / "model"))


def test_targets_of_every_kind_of_row(folder):
    """The template opens `<think>`: a target that opens it too does not open it twice."""
    processor = processor_of(folder)
    rows = TargetRows(load_examples(str(folder / "rows.jsonl"), answer_required=False), processor)
    texts = [processor.tokenizer.decode(completion) for completion in rows.completions]
    end = processor.tokenizer.eos_token
    opens = processor.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)
    reply = "Look</think>\n\\boxed{2}" if opens.rstrip().endswith("<think>") else "<think>\nLook</think>\n\\boxed{2}"
    assert texts == [f"\\boxed{{1}}{end}", reply + end, reply + end, f"4{end}"]


def test_ids_are_those_of_the_processor(folder):
    processor = processor_of(folder)
    sizes = [(32, 32), (64, 32), (50, 200)]
    content = "<image> a <image> b<image>"
    row = {"prompt": [{"role": "user", "content": content}], "completion": "c"}
    row["images"] = [picture(i, *size) for i, size in enumerate(sizes)]
    (example,) = examples_from_rows([row], answer_required=False)
    rows = TargetRows([example], processor)
    text = processor.apply_chat_template(example.messages, add_generation_prompt=True, tokenize=False)
    wanted = processor(text=[text], images=row["images"], add_special_tokens=False, return_tensors="pt")
    ids, num_prompt = rows.ids(0)
    assert ids[:num_prompt] == wanted["input_ids"][0].tolist() and len(ids) == rows.lengths[0]
    assert torch.equal(rows.vision_inputs(rows.images[0])["pixel_values"], wanted["pixel_values"])
    assert sum(rows.num_tiles(i) for i in rows.images[0]) == len(wanted["pixel_values"])


def bad_rows(**changes):
    rows = [{"id": f"r{i}", "prompt": "How many?", "completion": "2 " * (1 + 20 * i)} for i in range(4)]
    rows[1] |= changes
    return examples_from_rows(rows, answer_required=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": None}, r"row r1: it has no target text; fill the column `completion`, or end its messages"),
        ({"completion": "  "}, r"row r1: it has no target text"),
        ({"completion": "see <IMG_CONTEXT>"}, r"row r1: its target spells the image placeholder '<IMG_CONTEXT>'"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_its_id(folder, changes, message):
    with pytest.raises(DataError, match=message):
        TargetRows(bad_rows(**changes), processor_of(folder))


def test_rows_too_long_are_refused_or_left_out_never_cut(folder, capsys):
    processor, rows = processor_of(folder), bad_rows()
    whole = TargetRows(rows, processor)
    limit = sorted(whole.lengths)[2]
    with pytest.raises(DataError, match=rf"row r3 has \d+ tokens, `max_length` is {limit}\n.*filter_overlong_rows"):
        TargetRows(rows, processor, max_length=limit)
    kept = TargetRows(rows, processor, max_length=limit, filter_overlong=True)
    assert kept.lengths == whole.lengths[:3]
    assert "left out 1 rows (25.0 %)" in capsys.readouterr().out
    with pytest.raises(DataError, match="no row is left"):
        TargetRows(rows, processor, max_length=2, filter_overlong=True)


@pytest.mark.parametrize("chains", [*CHAINS, ["direct", "describe"]])
def test_scenes_give_targets_of_every_kind(chains):
    rows = load_examples(
        "scenes", dataset_size=12, dataset_kwargs={"chains": chains}, answer_required=False, split="heldout"
    )
    again = load_examples(
        "scenes", dataset_size=12, dataset_kwargs={"chains": chains}, answer_required=False, split="heldout"
    )
    assert [r.columns["completion"] for r in rows] == [r.columns["completion"] for r in again]
    assert all(1 <= len(row.images) <= 2 for row in rows)
    for row in rows:
        if row.columns["chain"] == "describe":
            assert row.columns["completion"].startswith("Look a1") and row.answer is None
        else:
            assert row.columns["completion"].endswith(f"\\boxed{{{row.answer}}}")


def test_chains_that_are_unknown_are_refused():
    with pytest.raises(DataError, match="careful, brief, mixed, direct, explain, describe; received 'long'"):
        load_examples("scenes", dataset_size=2, dataset_kwargs={"chains": "long"})


def test_sft_leaves_a_complete_stage_folder(folder, tmp_path):
    arguments = ["sft", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl")]
    arguments += ["--output_dir", str(tmp_path), "--max_steps", "2", "--packing", "true", "--max_length", "256", *PLAIN]
    assert main(arguments) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stage"] == "sft" and manifest["parent"]["path"] == str(folder / "model")
    assert set(manifest["weight_hashes"]) == {"vision_encoder", "projector", "language_model"}
    assert manifest["metrics"]["steps"] == 2 and manifest["data_hash"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "mean_token_accuracy", "entropy", "num_tokens", "packing/padding_share"} <= lines[0].keys()
    for name in ("config.yaml", "report.html", "model.safetensors", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / name).exists(), name
    assert not list(tmp_path.rglob("*.bin"))


def test_align_joins_parts_and_trains_the_projector_alone(tmp_path):
    arguments = [
        "align",
        "--config",
        "recipes/tiny/align.yaml",
        "--output_dir",
        str(tmp_path / "a"),
        "--max_steps",
        "8",
    ]
    assert main([*arguments, "--dataset_size", "64", "--logging_steps", "1", "--warmup_steps", "0"]) == 0
    parts = resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm")
    before = compose_vlm(*parts, tmp_path / "b", seed=0).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").state_dict()
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == {"projector"}
    losses = [json.loads(line).get("loss") for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    second = ["align", "--model_name_or_path", str(tmp_path / "a"), "--dataset_name", "scenes", "--dataset_size", "16"]
    second += ["--dataset_kwargs", "{chains: careful}", "--output_dir", str(tmp_path / "c"), "--max_length", "512"]
    assert main([*second, *PLAIN]) == 0
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["stage"] == "align" and manifest["parent"]["manifest_sha256"]
    first = json.loads((tmp_path / "a" / "manifest.json").read_text())["weight_hashes"]
    same = {part for part, digest in manifest["weight_hashes"].items() if digest == first[part]}
    assert same == {"vision_encoder", "language_model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "--vision_encoder", "tiny/vision_encoder", "--dataset_name", "scenes"], "language_model"),
        (["align", "--vision_encoder", "x", "--model_name_or_path", "y", "--dataset_name", "scenes"], "goes on from"),
        (["sft", "--dataset_name", "scenes"], "model_name_or_path"),
        (["sft", "--model_name_or_path", "MODEL"], "dataset_name"),
        (["sft", "--model_name_or_path", "MODEL", "--dataset_name", "scenes", "--dataset_size", "2"], "chains: mixed"),
        (["sft", "--model_name_or_path", "MODEL", "--load_in_4bit", "true", "--dataset_name", "scenes"], "quantised"),
    ],
)
def test_a_users_mistake_ends_with_one_message(folder, tmp_path, capsys, arguments, message):
    arguments = [str(folder / "model") if a == "MODEL" else a for a in arguments]
    assert main([*arguments, "--output_dir", str(tmp_path), *CPU]) == 2
    assert message in capsys.readouterr().err


def test_a_signal_leaves_a_checkpoint_that_resumes(folder, tmp_path):
    command = [sys.executable, "-m", "r1v_rl", "sft", "--model_name_or_path", str(folder / "model"), *PLAIN]
    command += ["--dataset_name", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path), "--max_steps"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*command, "5000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and run.poll() is None:
        if (tmp_path / "metrics.jsonl").exists() and (tmp_path / "metrics.jsonl").read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 143, output
    left = checkpoints.latest_complete(tmp_path)
    assert left is not None and not (tmp_path / "manifest.json").exists()
    step = checkpoints.step_of(left)
    refused = subprocess.run([*command, "5000"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "resume_from_checkpoint" in refused.stderr
    resumed = [*command, str(step + 1), "--resume_from_checkpoint", "true"]
    assert subprocess.run(resumed, capture_output=True, env=environment).returncode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == step + 1
    assert (tmp_path / "manifest.json").exists()

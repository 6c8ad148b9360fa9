"""`r1v-rl compose` and `r1v-rl transfer` leave stage folders, complete with their manifests."""

import json

import pytest
import yaml
from published_chat import INTERNVIT_6B, save_chat
from transformers import AutoModelForImageTextToText, AutoProcessor

from r1v_rl.checkpoints import file_sha256
from r1v_rl.cli import main
from r1v_rl.models.parts import PARTS, part_hashes

PARTS_OF_TINY = ["--vision_encoder", "tiny/vision_encoder", "--language_model", "tiny/substitute_llm"]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_compose_then_transfer_leave_two_stages(tmp_path, capsys):
    first, second = tmp_path / "compose", tmp_path / "transfer"
    assert main(["compose", *PARTS_OF_TINY, "--max_image_tiles", "4", "--seed", "3", "--output_dir", str(first)]) == 0
    assert "9 visual tokens a tile" in capsys.readouterr().out
    arguments = ["--projector_from", str(first), "--language_model", "tiny/reasoning_llm", "--output_dir", str(second)]
    assert main(["transfer", *arguments]) == 0
    assert "-> '<|im_start|>assistant\\n<think>\\n'" in capsys.readouterr().out
    one, two = manifest(first), manifest(second)
    assert (one["stage"], one["parent"], one["seeds"]) == ("compose", None, {"seed": 3})
    assert two["stage"] == "transfer"
    assert two["parent"] == {"path": str(first), "manifest_sha256": file_sha256(first / "manifest.json")}
    same = {part for part in PARTS if one["weight_hashes"][part] == two["weight_hashes"][part]}
    assert same == {"vision_encoder", "projector"}
    assert two["metrics"]["changed"]["generation_prompt"]["after"].endswith("<think>\n")
    assert two["metrics"]["embedding_cosine"] > 0.9
    for folder, found in ((first, one), (second, two)):
        assert found["weight_hashes"] == part_hashes(AutoModelForImageTextToText.from_pretrained(folder))
        assert yaml.safe_load((folder / "config.yaml").read_text()) == found["config"]
        assert AutoProcessor.from_pretrained(folder).image_processor.max_patches == 4


def test_convert_there_and_back_leaves_two_stages(tmp_path, capsys):
    source = save_chat(tmp_path / "chat", "v1", INTERNVIT_6B)
    there, back = tmp_path / "hf", tmp_path / "back"
    assert main(["convert", "--model_name_or_path", str(source), "--output_dir", str(there)]) == 0
    assert "tensors in 4 file(s), layout transformers" in capsys.readouterr().out
    arguments = ["--model_name_or_path", str(there), "--output_dir", str(back), "--original", str(source)]
    assert main(["convert", *arguments, "--to", "internvl_chat"]) == 0
    one, two = manifest(there), manifest(back)
    assert one["metrics"] == {"ps_version": "v1", "tensors": 67, "shards": 4}
    assert one["weight_hashes"] == part_hashes(AutoModelForImageTextToText.from_pretrained(there))
    assert two["parent"]["manifest_sha256"] == file_sha256(there / "manifest.json")
    assert two["weight_hashes"].keys() == set(PARTS)
    (source / "model-00001-of-00004.safetensors").unlink()
    assert main(["convert", "--model_name_or_path", str(source), "--output_dir", str(there)]) == 2
    assert "lacks model-00001-of-00004.safetensors" in capsys.readouterr().err
    assert not (there / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compose", "--output_dir", "x"], "the recipe must set vision_encoder, language_model"),
        (["compose", *PARTS_OF_TINY, "--output_dir", "x", "--max_image_tiles", "0"], "must be at least 1, received 0"),
        (["compose", *PARTS_OF_TINY, "--output_dir", "x", "--downsample_ratio", "2"], "at most 1, received 2"),
        (["compose", *PARTS_OF_TINY, "--output_dir", "x", "--dtype", "int8"], "must be one of float32"),
        (["transfer", "--projector_frm", "x"], "Did you mean `projector_from`?"),
        (["transfer", "--projector_from", "x", "--language_model", "y", "--output_dir", "z"], "x cannot be read"),
    ],
)
def test_mistakes_are_one_message(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_read_from_is_never_written_to(tmp_path, capsys):
    folder = str(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    arguments = ["--projector_from", folder, "--language_model", "tiny/reasoning_llm", "--output_dir", folder]
    assert main(["transfer", *arguments]) == 2
    assert "must not be a folder that is read from" in capsys.readouterr().err
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_a_stage_that_fails_leaves_no_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    arguments = [*PARTS_OF_TINY, "--output_dir", str(tmp_path), "--image_size", "97"]
    assert main(["compose", *arguments]) == 2
    assert not (tmp_path / "manifest.json").exists()

"""Converted checkpoints compute the same, come back bit by bit, and stop where a single key is not accounted for."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from published_chat import INTERNVIT_6B, INTERNVIT_300M, chat_logits, config_json, load_all, save_chat, vision_features
from random_parts import random_dinov2
from random_vlm import picture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GotOcr2ImageProcessor, InternVLForConditionalGeneration

from r1v_rl.data.chat import load_processor
from r1v_rl.errors import UserError
from r1v_rl.models.chat_config import transformers_config
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.convert import convert_checkpoint
from r1v_rl.models.encoders import load_vision_encoder
from r1v_rl.models.parts import part_hashes
from r1v_rl.tiny.parts import resolve_part

EVERY = pytest.mark.parametrize(
    ("version", "vision", "tied"),
    [
        ("v2", INTERNVIT_6B, False),
        ("v1", INTERNVIT_6B, False),
        ("v2", INTERNVIT_300M, True),
        ("v1", INTERNVIT_300M, True),
    ],
    ids=["6b-v2", "6b-v1", "300m-v2-tied", "300m-v1-tied"],
)


def inputs_of(folder, *pictures):
    processor = load_processor(str(folder))
    content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": "How many?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=[prompt], images=list(pictures), return_tensors="pt", add_special_tokens=False)


@EVERY
def test_logits_are_the_same_before_and_after(tmp_path, version, vision, tied):
    source = save_chat(tmp_path / "chat", version, vision, tied=tied)
    done = convert_checkpoint(source, tmp_path / "hf")
    assert (done.layout, done.ps_version, done.num_shards) == ("transformers", version, 4)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    inputs = inputs_of(tmp_path / "hf", picture(0, 150, 60), picture(1))
    tiles = load_processor(str(tmp_path / "hf")).image_processor
    upright = GotOcr2ImageProcessor(**tiles.to_dict())([picture(0, 150, 60), picture(1)], return_tensors="pt")
    assert len(upright["pixel_values"]) == 5  # three tiles, their thumbnail, and a picture of one tile
    expected = chat_logits(source, inputs["input_ids"], upright["pixel_values"])
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.std() > 0.5
    assert (logits - expected).abs().max() < 2e-4
    assert part_hashes(model) == done.weight_hashes


def test_the_two_pixel_shuffles_are_not_the_same_model(tmp_path):
    logits = []
    for version in ("v1", "v2"):
        source = save_chat(tmp_path / version, version, INTERNVIT_6B)
        convert_checkpoint(source, tmp_path / f"hf-{version}")
        inputs = inputs_of(tmp_path / "hf-v2" if version == "v2" else tmp_path / "hf-v1", picture(0))
        logits.append(chat_logits(source, inputs["input_ids"], torch.randn(1, 3, 56, 56, generator=_seeded())))
    assert (logits[0] - logits[1]).abs().max() > 0.05


def _seeded():
    return torch.Generator().manual_seed(0)


@EVERY
@pytest.mark.parametrize("original", [True, False])
def test_the_way_back_gives_every_bit(tmp_path, version, vision, tied, original):
    source = save_chat(tmp_path / "chat", version, vision, tied=tied)
    convert_checkpoint(source, tmp_path / "hf")
    done = convert_checkpoint(tmp_path / "hf", tmp_path / "back", original=source if original else None)
    assert (done.layout, done.ps_version) == ("internvl_chat", version)
    before, after = load_all(source), load_all(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    if original:
        for name in ("config.json", "modeling_skywork_chat.py", "tokenizer.json", "tokenizer_config.json"):
            same = [json.loads((f / name).read_text()) if name.endswith("json") else (f / name).read_text()
                    for f in (source, tmp_path / "back")]  # fmt: skip
            assert same[0] == same[1], name
    ids = torch.tensor([[1, 2, 3]])
    nothing = torch.zeros(0, 3, 56, 56)
    assert torch.equal(chat_logits(source, ids, nothing), chat_logits(tmp_path / "back", ids, nothing))


def test_a_model_saved_by_transformers_comes_back_too(tmp_path):
    """After training the weights stand in one file, in another order and with `q`, `k`, `v` apart."""
    source = save_chat(tmp_path / "chat", "v2", INTERNVIT_300M)
    convert_checkpoint(source, tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "trained", max_shard_size="100KB")
    load_processor(str(tmp_path / "hf")).save_pretrained(tmp_path / "trained")
    assert len(list((tmp_path / "trained").glob("*.safetensors"))) > 3
    convert_checkpoint(tmp_path / "trained", tmp_path / "back", original=source)
    before, after = load_all(source), load_all(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def change_weights(folder, change):
    """Rewrites the file that holds what `change` touches; the index follows."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = change(load_file(path))
        save_file(tensors, path)
        weight_map |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))


def test_missing_and_left_over_keys_are_listed_and_nothing_is_written(tmp_path):
    source = save_chat(tmp_path / "chat", "v2", INTERNVIT_6B)
    old, new = "vision_model.encoder.layers.1.attn.q_norm.weight", "vision_model.encoder.layers.1.attn.q_nrom.weight"

    def change(tensors):
        tensors = {new if name == old else name: tensor for name, tensor in tensors.items()}
        if "mlp1.1.weight" in tensors:
            tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:, :-1].contiguous()
        return tensors

    change_weights(source, change)
    with pytest.raises(UserError) as error:
        convert_checkpoint(source, tmp_path / "hf")
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        "1 missing:", f"  {old}", "1 left over:", f"  {new}",
        "1 of another shape:", "  mlp1.1.weight: [64, 191] instead of [64, 192]",
    ]  # fmt: skip
    assert not (tmp_path / "hf").exists()


def test_the_way_back_lists_missing_and_left_over_keys_too(tmp_path):
    convert_checkpoint(save_chat(tmp_path / "chat", "v2", INTERNVIT_6B), tmp_path / "hf")
    change_weights(
        tmp_path / "hf",
        lambda tensors: {name.replace("1.mlp.fc1.bias", "1.mlp.fc9.bias"): t for name, t in tensors.items()},
    )
    with pytest.raises(UserError) as error:
        convert_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert "  vision_tower.encoder.layer.1.mlp.fc1.bias" in str(error.value)
    assert "  vision_tower.encoder.layer.1.mlp.fc9.bias" in str(error.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v3"}, "`ps_version` in config.json must be v1 or v2"),
        ({"select_layer": -4}, "`select_layer` .* received -4"),
        ({"force_image_size": 448}, r"`force_image_size` .*\(56\)"),
        ({"use_thumbnail": False}, "`use_thumbnail` in config.json must be true"),
        (
            {"model_type": "llava"},
            "must be of model_type internvl_chat, skywork_chat, intern_vit_6b, internvl, received",
        ),
        ({"llm_config": {"model_type": "internlm2"}}, "`llm_config.model_type` .* received 'internlm2'"),
        ({"vision_config": {"layer_norm_eps": 1e-5}}, "`vision_config.layer_norm_eps` .* 1e-05"),
        ({"llm_config": {"vocab_size": 100}}, "embedding has 100 rows, too few"),
    ],
)
def test_what_transformers_cannot_do_is_refused(tmp_path, change, message):
    source = save_chat(tmp_path / "chat", "v2", INTERNVIT_6B)
    config = json.loads((source / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert_checkpoint(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_tied_head_that_is_another_one_is_refused(tmp_path):
    source = save_chat(tmp_path / "chat", "v2", INTERNVIT_6B, tied=True)
    embedding = load_all(source)["language_model.model.embed_tokens.weight"]

    def with_head(head):
        def change(tensors):
            if "language_model.model.embed_tokens.weight" in tensors:
                tensors["language_model.lm_head.weight"] = head
            return tensors

        change_weights(source, change)

    with_head(embedding.clone())
    convert_checkpoint(source, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert load_all(tmp_path / "back").keys() == load_all(source).keys()
    with_head(embedding + 1)
    with pytest.raises(UserError, match="set it to false"):
        convert_checkpoint(source, tmp_path / "hf2")


def test_folders_and_layouts_that_do_not_go_together_are_refused(tmp_path):
    source = save_chat(tmp_path / "chat", "v2", INTERNVIT_6B)
    with pytest.raises(UserError, match="in the layout `internvl_chat` already"):
        convert_checkpoint(source, tmp_path / "hf", to="internvl_chat")
    with pytest.raises(UserError, match="`original` is for the way back"):
        convert_checkpoint(source, tmp_path / "hf", original=source)
    with pytest.raises(UserError, match="has none"):
        convert_checkpoint(tmp_path, tmp_path / "hf")
    convert_checkpoint(source, tmp_path / "hf")
    other = save_chat(tmp_path / "other", "v2", INTERNVIT_300M)
    with pytest.raises(UserError, match="describes another model"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "back", original=other)
    shutil.rmtree(other)
    with pytest.raises(UserError, match="`ps_version` v2"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "back", original=save_chat(other, "v1", INTERNVIT_6B))
    tokenizer = save_chat(tmp_path / "bare", "v2", INTERNVIT_6B)
    for path in tokenizer.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="must hold its tokenizer"):
        convert_checkpoint(tokenizer, tmp_path / "hf3")
    (source / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00003-of-00004\.safetensors"):
        convert_checkpoint(source, tmp_path / "hf3")


@pytest.mark.parametrize("vision", [INTERNVIT_6B, INTERNVIT_300M])
def test_a_published_vision_encoder_alone_becomes_one_that_compose_takes(tmp_path, vision):
    folder = tmp_path / "vit"
    source = save_chat(tmp_path / "chat", "v2", vision)
    folder.mkdir()
    mine = {name: w for name, w in load_all(source).items() if name.startswith("vision_model.")}
    save_file({name.removeprefix("vision_model."): w for name, w in mine.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    with pytest.raises(UserError, match="r1v-rl convert"):
        load_vision_encoder(folder)
    done = convert_checkpoint(folder, tmp_path / "tower")
    encoder = load_vision_encoder(tmp_path / "tower").eval()
    pixels = torch.randn(2, 3, 56, 56, generator=_seeded())
    with torch.no_grad():
        found = encoder(pixels).last_hidden_state[:, 1:]
    assert (found - vision_features(config, mine, pixels)).abs().max() < 1e-4
    model = compose_vlm(tmp_path / "tower", resolve_part("tiny/reasoning_llm"), tmp_path / "vlm")
    assert part_hashes(model)["vision_encoder"] == done.weight_hashes["vision_encoder"]
    assert list(load_processor(str(tmp_path / "vlm")).image_processor.image_mean) == [0.4] * 3
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"missing:\n  encoder\.layers\.2\.attn"):
        convert_checkpoint(folder, tmp_path / "other")


def test_an_encoder_that_the_published_layout_cannot_hold_is_refused(tmp_path):
    compose_vlm(random_dinov2(), resolve_part("tiny/reasoning_llm"), tmp_path / "vlm", image_size=56)
    with pytest.raises(UserError, match=r"2 without a place:\n  vision_tower\.layernorm\.weight"):
        convert_checkpoint(tmp_path / "vlm", tmp_path / "chat")
    compose_vlm(resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm"), tmp_path / "tiny")
    with pytest.raises(UserError, match=r"ImageNet's mean .* \[0\.48145466"):
        convert_checkpoint(tmp_path / "tiny", tmp_path / "chat")
    assert not (tmp_path / "chat").exists()
    shutil.copytree(resolve_part("tiny/vision_encoder"), tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    compose_vlm(tmp_path / "encoder", resolve_part("tiny/reasoning_llm"), tmp_path / "tiny")
    convert_checkpoint(tmp_path / "tiny", tmp_path / "chat")
    convert_checkpoint(tmp_path / "chat", tmp_path / "again")
    models = [AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("tiny", "again")]
    assert part_hashes(models[0]) == part_hashes(models[1])


def test_the_published_38b_has_the_parameters_that_are_published():
    """Skywork R1V: InternViT-6B-448px-V2_5 and Qwen2.5-32B; the projector alone 91,786,240."""
    chat = config_json("v2", INTERNVIT_6B, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                       num_attention_heads=40, num_key_value_heads=8, vocab_size=152064)  # fmt: skip
    sizes = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25}
    chat["vision_config"] |= sizes | {"image_size": 448}
    config = transformers_config(chat | {"force_image_size": 448}, 151667)
    assert config.image_seq_length == 256
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.model.multi_modal_projector.parameters()) == 91_786_240
    vision, llm = model.model.vision_tower, model.model.language_model
    assert sum(p.numel() for p in vision.parameters()) == pytest.approx(5.54e9, rel=0.01)
    assert sum(p.numel() for p in (*llm.parameters(), *model.lm_head.parameters())) == pytest.approx(32.76e9, rel=0.01)


MEASURED = """
import re, sys
import r1v_rl, torch
from r1v_rl.models.convert import convert_checkpoint
# not ru_maxrss, which starts at what the parent had
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
convert_checkpoint(sys.argv[1], sys.argv[2])
before = peak()
convert_checkpoint(sys.argv[3], sys.argv[4])
convert_checkpoint(sys.argv[4], sys.argv[5])
print(peak() - before)
"""


def test_memory_is_that_of_a_shard_both_ways(tmp_path):
    small = save_chat(tmp_path / "small", "v1", INTERNVIT_6B)
    large = save_chat(
        tmp_path / "large", "v1", INTERNVIT_6B, num_shards=10, intermediate_size=40000, num_hidden_layers=10
    )
    megabytes = [path.stat().st_size / 2**20 for path in large.glob("*.safetensors")]
    folders = [small, tmp_path / "a", large, tmp_path / "b", tmp_path / "c"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, folders)], capture_output=True, text=True, check=True, timeout=200
    )
    grown = float(done.stdout.split()[-1])
    assert sum(megabytes) > 290 and max(megabytes) < 50
    assert grown < 3 * max(megabytes), (grown, max(megabytes))  # the shard, mapped and as it is written
    assert load_all(tmp_path / "c").keys() == load_all(large).keys()


def test_an_earlier_model_in_the_folder_is_replaced_whole(tmp_path):
    convert_checkpoint(save_chat(tmp_path / "one", "v2", INTERNVIT_6B, num_shards=1), tmp_path / "hf")
    source = save_chat(tmp_path / "two", "v2", INTERNVIT_300M)
    convert_checkpoint(source, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 4
    convert_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert load_all(tmp_path / "back").keys() == load_all(source).keys()
    with pytest.raises(UserError, match="must not be the folder that is read from"):
        convert_checkpoint(source, source)


def test_without_this_package_a_transposed_model_does_not_load(tmp_path):
    """Rather than be shown pictures the wrong way round."""
    convert_checkpoint(save_chat(tmp_path / "chat", "v1", INTERNVIT_6B), tmp_path / "hf")
    script = "import r1v_rl, sys; from transformers import AutoProcessor; AutoProcessor.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "hf")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "Unrecognized image processor" in done.stderr

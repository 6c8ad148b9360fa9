"""A made-up checkpoint in the published `internvl_chat` layout, and what that layout computes, written out anew."""

import json
from pathlib import Path

import r1v_rl  # isort: skip  # noqa: F401  (prepares a spawned process before torchvision is imported)
import torch
from random_parts import text_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

VISION = {
    "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 80, "image_size": 56, "patch_size": 14, "num_channels": 3,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "initializer_factor": 0.1, "initializer_range": 0.02,
    "dropout": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.4, "use_flash_attn": True, "torch_dtype": "bfloat16",
}  # fmt: skip
INTERNVIT_6B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
INTERNVIT_300M = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}


def chat_tokenizer():
    """Like Qwen2.5's: it knows the image tokens, but not by the names that transformers' processor asks for."""
    tokenizer = text_tokenizer()
    tokenizer.add_tokens(["<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>"], special_tokens=True)
    return tokenizer


def config_json(version: str, vision: dict, *, tied: bool = False, **text) -> dict:
    """Keys and spelling as published, the generation settings of old configurations included."""
    tokenizer = chat_tokenizer()
    llm = {
        "_name_or_path": "somewhere/Qwen2.5", "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": tied, "torch_dtype": "float32", "attn_implementation": "flash_attention_2",
        "do_sample": False, "max_length": 20, "temperature": 1.0, "num_beams": 1, "use_cache": True,
        "sliding_window": None, "use_sliding_window": False, **text,
    }  # fmt: skip
    return {
        "_commit_hash": None, "architectures": ["SkyworkR1VChatModel"], "model_type": "skywork_chat",
        "auto_map": {"AutoConfig": "a.SkyworkChatConfig", "AutoModel": "b.SkyworkChatModel"}, "downsample_ratio": 0.5,
        "dynamic_image_size": True, "force_image_size": 56, "hidden_size": 64, "llm_config": llm,
        "max_dynamic_patch": 6, "min_dynamic_patch": 1, "pad2square": False, "ps_version": version, "select_layer": -1,
        "template": "internvl2_5", "torch_dtype": "float32", "use_thumbnail": True, "vision_config": VISION | vision,
    }  # fmt: skip


def language_model(config: dict) -> Qwen2ForCausalLM:
    """The language model of a configuration, with any weights."""
    settings = {key: value for key, value in config["llm_config"].items() if key != "attn_implementation"}
    return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()


def _weights(config: dict) -> dict[str, Tensor]:
    vision, llm, generator = config["vision_config"], config["llm_config"], torch.Generator().manual_seed(0)
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches, norms = (vision["image_size"] // 14) ** 2, ["weight"] + ["bias"] * (vision["norm_type"] == "layer_norm")
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, width), "embeddings.position_embedding": (1, patches + 1, width),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14), "embeddings.patch_embedding.bias": (width,),
    }  # fmt: skip
    for n in range(vision["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,), "mlp.fc2.weight": (width, inner),
            "mlp.fc2.bias": (width,), "ls1": (width,), "ls2": (width,),
        }  # fmt: skip
        layer |= {f"norm{i}.{kind}": (width,) for i in (1, 2) for kind in norms}
        layer |= {"attn.qkv.bias": (3 * width,)} if vision["qkv_bias"] else {}
        layer |= {f"attn.{i}_norm.weight": (width,) for i in "qk"} if vision["qk_normalization"] else {}
        shapes |= {f"encoder.layers.{n}.{name}": shape for name, shape in layer.items()}
    shapes = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    deep, out = 4 * width, llm["hidden_size"]
    shapes |= {"mlp1.0.weight": (deep,), "mlp1.0.bias": (deep,), "mlp1.1.weight": (out, deep), "mlp1.1.bias": (out,)}
    shapes |= {"mlp1.3.weight": (out, out), "mlp1.3.bias": (out,)}
    for name, weight in language_model(config).state_dict().items():
        if not (llm["tie_word_embeddings"] and name == "lm_head.weight"):
            shapes[f"language_model.{name}"] = tuple(weight.shape)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def save_chat(folder: Path, version: str, vision: dict, *, num_shards: int = 4, tied: bool = False, **text) -> Path:
    """Sharded in an order of its own: parts of one layer stand in different files."""
    folder.mkdir(parents=True)
    config = config_json(version, vision, tied=tied, **text)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "modeling_skywork_chat.py").write_text("# the published code\n")
    chat_tokenizer().save_pretrained(folder)
    weights, weight_map = _weights(config), {}
    for number in range(num_shards):
        names = list(weights)[number::num_shards]
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else "model.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if num_shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@torch.no_grad()
def chat_logits(folder: Path, input_ids: Tensor, pixels: Tensor) -> Tensor:
    """Logits (B, T, V) of the published model: `pixels` (tiles, 3, side, side) fill the image tokens in order."""
    config, weights = json.loads((folder / "config.json").read_text()), load_all(folder)
    llm = language_model(config)
    text = {name.removeprefix("language_model."): w for name, w in weights.items() if name.startswith("language_model")}
    llm.load_state_dict(text, strict=not config["llm_config"]["tie_word_embeddings"])
    llm.tie_weights()
    features = vision_features(config["vision_config"], weights, pixels)
    tokens = _pixel_shuffle(features, config["downsample_ratio"], config["ps_version"])
    tokens = F.layer_norm(tokens, tokens.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"])
    tokens = F.gelu(tokens @ weights["mlp1.1.weight"].T + weights["mlp1.1.bias"])
    tokens = tokens @ weights["mlp1.3.weight"].T + weights["mlp1.3.bias"]
    embedded = llm.get_input_embeddings()(input_ids)
    embedded[input_ids == chat_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")] = tokens.flatten(0, 1)
    return llm(inputs_embeds=embedded).logits


def vision_features(config: dict, weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Last hidden states of the patches, (tiles, patches, width): pre-norm layers, no norm after the last one."""
    w = {name.removeprefix("vision_model."): weight for name, weight in weights.items()}
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def rms(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())

    def norm(x: Tensor, name: str) -> Tensor:
        if config["norm_type"] == "rms_norm":
            return rms(x, name)
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    patches = F.conv2d(pixels, w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"], stride=14)
    x = torch.cat([w["embeddings.class_embedding"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    x = x + w["embeddings.position_embedding"]
    for n in range(config["num_hidden_layers"]):
        prefix = f"encoder.layers.{n}"
        qkv = F.linear(norm(x, f"{prefix}.norm1"), w[f"{prefix}.attn.qkv.weight"], w.get(f"{prefix}.attn.qkv.bias"))
        q, k, v = qkv.chunk(3, -1)
        if config["qk_normalization"]:
            q, k = rms(q, f"{prefix}.attn.q_norm"), rms(k, f"{prefix}.attn.k_norm")
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        attended = attended.transpose(1, 2).flatten(2)
        x = x + F.linear(attended, w[f"{prefix}.attn.proj.weight"], w[f"{prefix}.attn.proj.bias"]) * w[f"{prefix}.ls1"]
        h = F.gelu(F.linear(norm(x, f"{prefix}.norm2"), w[f"{prefix}.mlp.fc1.weight"], w[f"{prefix}.mlp.fc1.bias"]))
        x = x + F.linear(h, w[f"{prefix}.mlp.fc2.weight"], w[f"{prefix}.mlp.fc2.bias"]) * w[f"{prefix}.ls2"]
    return x[:, 1:]


def _pixel_shuffle(features: Tensor, ratio: float, version: str) -> Tensor:
    """(tiles, tokens, width / ratio^2); v1 leaves the two directions swapped, v2 swaps them back."""
    side = round(features.shape[1] ** 0.5)
    x = features.unflatten(1, (side, side))
    n, w, h, c = x.shape
    x = x.reshape(n, w, int(h * ratio), int(c / ratio)).permute(0, 2, 1, 3)
    x = x.reshape(n, int(h * ratio), int(w * ratio), int(c / ratio**2))
    return (x if version == "v1" else x.permute(0, 2, 1, 3)).flatten(1, 2)

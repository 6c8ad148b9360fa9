"""`config.json` of the published `internvl_chat` layout (InternVL, Skywork R1V) and of transformers' InternVL."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, InternVLConfig, InternVLVisionConfig

from r1v_rl.errors import UserError
from r1v_rl.models.compose import LANGUAGE_MODELS

CHAT_TYPES = ("internvl_chat", "skywork_chat")
VISION_TYPE = "intern_vit_6b"
"""A published vision encoder alone: InternViT-6B, InternViT-300M."""
VISION_DEFAULTS: Mapping[str, Any] = {
    "num_channels": 3, "patch_size": 14, "image_size": 224, "qkv_bias": False, "hidden_size": 3200,
    "num_attention_heads": 25, "intermediate_size": 12800, "qk_normalization": True, "num_hidden_layers": 48,
    "hidden_act": "gelu", "norm_type": "rms_norm", "layer_norm_eps": 1e-6, "dropout": 0.0, "attention_dropout": 0.0,
    "initializer_range": 0.02, "initializer_factor": 0.1,
}  # fmt: skip
"""What the published vision configuration assumes where its JSON leaves a key out."""

_VISION_NAMES = {
    "num_channels": "num_channels", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size", "num_hidden_layers": "num_hidden_layers", "hidden_act": "hidden_act",
    "norm_type": "norm_type", "layer_norm_eps": "layer_norm_eps", "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range", "initializer_factor": "layer_scale_init_value",
    "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "dropout": "projection_dropout",
    "patch_size": "patch_size", "image_size": "image_size",
}  # fmt: skip
_NOT_OF_THE_MODEL = ("_name_or_path", "_attn_implementation_autoset", "attn_implementation", "auto_map", "torch_dtype")
_CHAT_TEMPLATE = "internvl2_5"


def is_chat_config(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of the `internvl_chat` layout, a vision encoder alone included."""
    return config.get("model_type") in (*CHAT_TYPES, VISION_TYPE)


def ps_version(config: Mapping[str, Any]) -> str:
    """`v1` (visual tokens in transposed order) or `v2`; the published class assumes v1."""
    version = config.get("ps_version", "v1")
    if version not in ("v1", "v2"):
        raise UserError(f"`ps_version` in config.json must be v1 or v2, received {version!r}")
    return version


def transformers_config(chat: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """The configuration of the same model in transformers.

    Raises:
        UserError: If the model does what transformers' InternVL does not.
    """
    vision = vision_config(chat["vision_config"])
    llm = {key: value for key, value in chat["llm_config"].items() if key not in _NOT_OF_THE_MODEL}
    family = llm.get("model_type")
    _refuse(family not in LANGUAGE_MODELS, "llm_config.model_type", " or ".join(LANGUAGE_MODELS), family)
    _refuse(
        chat.get("select_layer", -1) != -1,
        "select_layer",
        "-1 (vLLM reads the last layer only)",
        chat.get("select_layer"),
    )
    side = vision.image_size[0]
    size = chat.get("force_image_size") or side
    _refuse(size != side, "force_image_size", f"vision_config.image_size ({side})", size)
    ratio = chat.get("downsample_ratio", 0.5)
    tied = bool(llm.get("tie_word_embeddings", False))
    text = CONFIG_MAPPING[family](**llm | {"tie_word_embeddings": tied})
    dtype = chat.get("torch_dtype") or chat.get("dtype") or chat["llm_config"].get("torch_dtype") or "bfloat16"
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=image_token_id,
        image_seq_length=int((size // vision.patch_size[0] * ratio) ** 2),
        downsample_ratio=ratio,
        tie_word_embeddings=tied,
        dtype=dtype,
        architectures=["InternVLForConditionalGeneration"],
    )


def vision_config(vision: Mapping[str, Any]) -> InternVLVisionConfig:
    """The configuration of the same vision encoder in transformers, from a published one (InternViT's)."""
    vision = {**VISION_DEFAULTS, **vision}
    if vision["qk_normalization"]:  # transformers has this number in the code of its norm
        _refuse(vision["layer_norm_eps"] != 1e-6, "vision_config.layer_norm_eps", "1e-6", vision["layer_norm_eps"])
    return InternVLVisionConfig(
        **{theirs: vision[ours] for ours, theirs in _VISION_NAMES.items()},
        use_mean_pooling=True,  # which is what leaves the final norm out
        dtype=vision.get("torch_dtype") or vision.get("dtype") or "bfloat16",
        architectures=["InternVLVisionModel"],
    )


def chat_config(config: InternVLConfig, *, tiles: Mapping[str, Any], version: str) -> dict[str, Any]:
    """A `config.json` of the `internvl_chat` layout for a model that never was in it.

    Args:
        tiles: Settings of the image processor: `min_patches`, `max_patches`. InternVL's processor cuts whatever its
            `crop_to_patches` says.
        version: Its `ps_version`.
    """
    vision, text = config.vision_config.to_dict(), config.text_config.to_dict()
    (size, _), (patch, _) = vision["image_size"], vision["patch_size"]
    described = {ours: vision[theirs] for ours, theirs in _VISION_NAMES.items()}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": tiles["max_patches"] > 1,
        "force_image_size": size,
        "hidden_size": text["hidden_size"],
        "llm_config": text,
        "max_dynamic_patch": tiles["max_patches"],
        "min_dynamic_patch": tiles["min_patches"],
        "pad2square": False,
        "ps_version": version,
        "select_layer": -1,
        "template": _CHAT_TEMPLATE,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "use_thumbnail": True,
        "vision_config": described
        | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": size,
            "patch_size": patch,
        }
        | {"drop_path_rate": 0.0},
    }


def _refuse(is_wrong: bool, key: str, wanted: str, received: Any) -> None:
    if is_wrong:
        raise UserError(f"`{key}` in config.json must be {wanted} to fit transformers' InternVL; received {received!r}")

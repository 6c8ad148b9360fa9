"""Random vision encoders and language models, and a tokenizer that has never heard of images."""

from pathlib import Path

import r1v_rl  # isort: skip  # noqa: F401  (prepares a spawned process before torchvision is imported)
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
TEXT_TEMPLATE = (
    "{%- for message in messages -%}<|user|>{{ message['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
"""It adds strings, as the templates of text models do: content blocks would be an error."""


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, without image tokens; its template knows text alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = TEXT_TEMPLATE
    return tokenizer


def random_llm(family: str, *, tied: bool, seed: int = 0, spare_rows: int = 0, **settings) -> PreTrainedModel:
    """Width 64, head size 32, 2 layers, far enough from uniform that tokens matter."""
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    tokenizer = text_tokenizer()
    shape = {
        "vocab_size": len(tokenizer) + spare_rows, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = model_class(config_class(**shape | settings, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def save_llm(folder: Path, family: str = "llama", *, tied: bool = True, tokenizer=None, **settings) -> Path:
    """The same with its tokenizer as a folder."""
    random_llm(family, tied=tied, **settings).save_pretrained(folder)
    (tokenizer or text_tokenizer()).save_pretrained(folder)
    return folder


def random_dinov2(image_size: int = 70, **settings) -> Dinov2Model:
    """Width 64, 2 layers, patches of 14 px, layer scales and biases drawn too."""
    torch.manual_seed(1)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": image_size}
    model = Dinov2Model(Dinov2Config(**shape | {"patch_size": 14} | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model

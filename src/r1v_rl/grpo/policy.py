"""The policy, its reference and its rollout engine, made from the recipe."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import disable_dropout_in_model

from r1v_rl.data.chat import load_processor
from r1v_rl.errors import RecipeError
from r1v_rl.grpo.config import GRPOConfig
from r1v_rl.models.logprobs import add_logprob_head, check_head
from r1v_rl.models.packing import enable_packing, why_not_packed
from r1v_rl.models.parts import freeze_all_but
from r1v_rl.models.sharding import is_sharded, reshard, unsharded_twin, whole_state
from r1v_rl.models.vision_features import VisionFeatures
from r1v_rl.rollout.engine import RolloutEngine
from r1v_rl.rollout.hf import TransformersEngine
from r1v_rl.rollout.model_folder import end_token_ids, folder_with
from r1v_rl.rollout.prompts import placeholder_ids
from r1v_rl.rollout.servers import ServerEngine
from r1v_rl.rollout.vllm_inprocess import VllmEngine
from r1v_rl.rollout.vllm_requests import engine_options
from r1v_rl.training.engines import frozen_modules, keeps_frozen_tower, shards_weights
from r1v_rl.training.launch import DEFAULT_TRAINABLE, load_model
from r1v_rl.types import Completion, Example

logger = logging.get_logger(__name__)


def prepare_models(
    model: str | PreTrainedModel, processor: Any, args: GRPOConfig, peft_config: Any
) -> tuple[Any, Any, Any]:
    """Policy, reference (None without `beta`, and where the policy without its adapter is the reference), processor."""
    policy = load_model(model, args.model_init_kwargs) if isinstance(model, str) else model
    processor = processor or load_processor(policy.name_or_path)
    if peft_config is not None and args.trainable is not None:
        raise RecipeError(
            "`trainable` and a LoRA adapter exclude each other: name the parts that train in full in "
            "`lora_modules_to_save`, which is saved with the adapter"
        )
    freeze_all_but(policy, list(args.trainable or DEFAULT_TRAINABLE))
    if args.disable_dropout:
        disable_dropout_in_model(policy)
    reference = None
    if args.beta != 0.0 and peft_config is None:
        again = is_sharded(policy)  # ZeRO-3 spreads weights as they are read; a shard cannot be copied
        reference = load_model(policy.name_or_path, args.model_init_kwargs) if again else copy.deepcopy(policy)
        reference.requires_grad_(False).eval()
    for each in (policy, reference):
        if each is not None:
            add_logprob_head(
                each,
                temperature=args.temperature,
                float32_head=args.cast_lm_head_to_fp32,
                logprobs_only=not args.entropy_coef,
            )
    if peft_config is not None:
        from peft import get_peft_model

        check_head(policy, peft_config)
        set_seed(args.seed)  # every process starts with the same adapter
        policy = get_peft_model(policy, peft_config)
        if args.gradient_checkpointing:
            policy.enable_input_require_grads()
    return policy, reference, processor


def shares_prefix(args: GRPOConfig, *models: Any) -> bool:
    """Whether prompts are run once a group, as the recipe asks: then every model is made ready for packed rows.

    Where one cannot run them, a warning says why, and the update runs padded rows. None stands for no model.
    """
    if not args.share_prefix:
        return False
    used = [model for model in models if model is not None]
    for model in used:
        if reason := why_not_packed(model):
            logger.warning(f"share_prefix: the prompt is run once for every completion, because {reason}")
            return False
    for model in used:
        enable_packing(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return True


def frozen_vision(policy: Any, args: GRPOConfig, accelerator: Accelerator) -> VisionFeatures | None:
    """What runs a frozen vision encoder ahead of every pass; None where the passes run it themselves.

    Raises:
        RecipeError: If the recipe asks for a cache where there cannot be one.
    """
    reason = VisionFeatures.why_not(policy)
    if reason is None and not keeps_frozen_tower(accelerator):
        reason = "ZeRO-3 gathers weights inside of the model's own forward only"
    if reason is None:
        keeps = args.vision_features == "cache"
        return VisionFeatures(policy, cache_bytes=args.vision_cache_memory_bytes if keeps else 0)
    if args.vision_features == "cache":
        raise RecipeError(f"`vision_features: cache` cannot be: {reason}. Set `vision_features: recompute`.")
    return None


@contextmanager
def reference_policy(reference: nn.Module | None, policy: Any, wrapped: nn.Module) -> Iterator[nn.Module]:
    """The model that the KL term is measured against: its own copy, or the policy, as its engine has wrapped it,
    without its adapter."""
    if reference is not None:
        yield reference
        return
    reshard(policy)
    with policy.disable_adapter():
        yield wrapped
        reshard(policy)


def prepare_reference(reference: Any, accelerator: Accelerator, args: GRPOConfig) -> nn.Module:
    """A reference of its own, spread over the processes as the policy is.

    Raises:
        RecipeError: If it is to follow the policy, and its weights are spread.
    """
    if args.sync_ref_model and shards_weights(accelerator):
        raise RecipeError("`sync_ref_model` is not supported under FSDP2 and ZeRO-3: launch with DDP or ZeRO-2")
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.ignored_modules += frozen_modules(reference, accelerator)
        reference = fsdp2_prepare_model(accelerator, reference)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def make_engine(
    policy: Any, processor: Any, args: GRPOConfig, examples: Sequence[Example], accelerator: Accelerator
) -> RolloutEngine:
    """vLLM in this process or behind servers, or transformers' `generate`: on the policy itself, or on a whole twin of
    it where training spreads the weights over processes."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens: dict[str, Any] = {
        "eos_token_ids": end_token_ids(policy.generation_config.eos_token_id, tokenizer),
        "banned_token_ids": placeholder_ids(policy.config),
    }
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    if not args.use_vllm:
        shards = shards_weights(accelerator)
        return TransformersEngine(unsharded_twin(base) if shards else policy, tokenizer, **tokens, twin=shards)

    def save(folder: str) -> None:
        base.save_pretrained(folder, state_dict=whole_state(base))

    model = folder_with(processor, base.name_or_path, save)
    options: dict[str, Any] = {
        "dtype": _engine_dtype(policy, args),
        "max_model_len": args.vllm_max_model_length,
        "temperature": args.temperature,
        "max_images": max((len(example.images) for example in examples), default=0),
        "seed": args.seed,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "kv_cache_memory_bytes": args.vllm_kv_cache_memory_bytes,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
    }
    if args.vllm_mode == "server":
        settings = args.server_settings()
        vllm = engine_options(**options, on_cpu=not torch.cuda.is_available())
        return ServerEngine(model, vllm, settings, accelerator, tokenizer=tokenizer, **tokens)
    with model as folder:
        return VllmEngine(folder, **options, **tokens)


def check_versions(completions: Sequence[Sequence[Completion]], version: int) -> None:
    """Raises RuntimeError where a completion was not sampled with the weights of this step: nothing may train on it."""
    found = {completion.weight_version for group in completions for completion in group}
    if found - {version}:
        raise RuntimeError(f"the rollout engine answered with weights of step {sorted(map(str, found))}, not {version}")


def _engine_dtype(policy: nn.Module, args: GRPOConfig) -> str:
    if args.bf16:
        return "bfloat16"
    return str(next(policy.parameters()).dtype).removeprefix("torch.")

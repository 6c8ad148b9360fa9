"""Every key of `r1v-rl chat`: the model, the pictures, the sampling, the backend."""

from dataclasses import dataclass, field

from r1v_rl.errors import RecipeError
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.vllm_server import LOOPBACK


@dataclass
class ChatConfig:
    """Sampling defaults are those of Skywork R1V's released inference script."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a vision-language model."}
    )
    image: list[str] | None = field(
        default=None, metadata={"help": "Pictures of the question; several, or the key several times."}
    )
    question: str | None = field(
        default=None,
        metadata={"help": "`<image>` marks where a picture goes; without marks they come first. Unset: from a pipe."},
    )
    interactive: bool = field(
        default=False, metadata={"help": "Go on asking; the conversation is kept. /help lists what may be typed."}
    )
    serve: bool = field(
        default=False, metadata={"help": "Start vLLM's OpenAI-compatible server for the model instead of chatting."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message of the conversation."})
    show_thinking: bool = field(default=True, metadata={"help": "Whether the thinking is shown, or its length alone."})
    max_image_tiles: int | None = field(
        default=None,
        metadata={"help": "Most tiles of a picture (Skywork R1V: 12 and a thumbnail); unset = the model's own."},
    )
    max_images: int = field(default=16, metadata={"help": "Most pictures in one conversation."})
    max_completion_length: int = field(
        default=8192, metadata={"help": "Most tokens of an answer, less where the context is shorter."}
    )
    temperature: float = field(default=0.6, metadata={"help": "0 = always the most likely token."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling."})
    top_k: int = field(default=0, metadata={"help": "Most likely tokens to draw from; 0 = all."})
    min_p: float | None = field(default=None, metadata={"help": "Least share of the most likely token's probability."})
    repetition_penalty: float = field(default=1.05, metadata={"help": "Above 1 repeats less."})
    seed: int | None = field(default=None, metadata={"help": "Of the sampling; unset = another one each time."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Arithmetic; auto = as saved.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "`auto` spreads the model over all GPUs (accelerate); unset = the first one, or the CPU."},
    )
    use_vllm: bool = field(default=False, metadata={"help": "vLLM in this process; else transformers' `generate`."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM spreads the model over."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of each GPU's memory."})
    vllm_kv_cache_memory_bytes: int | None = field(
        default=None, metadata={"help": "KV cache of vLLM in bytes; unset = vLLM's own measure."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest conversation in tokens; unset = the model's context."}
    )
    host: str = field(
        default=LOOPBACK[0],
        metadata={"help": "With --serve. Any but loopback needs an API key in the environment (VLLM_API_KEY)."},
    )
    port: int = field(default=8000, metadata={"help": "With --serve."})
    takes_weights: bool = field(
        default=False,
        metadata={
            "help": "With --serve. For `vllm_server_base_url` of a GRPO run: it takes the policy's weights, and "
            "every request needs the key in VLLM_API_KEY. Set `temperature`, `max_images` and `dtype` as in the run."
        },
    )

    def __post_init__(self) -> None:
        for key in ("max_images", "max_completion_length", "max_image_tiles", "vllm_max_model_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise RecipeError(f"`{key}` must be at least 1, received {value}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise RecipeError(
                f"`temperature` must be 0 or more, `top_p` above 0 and at most 1, `repetition_penalty` above 0; "
                f"received {self.temperature}, {self.top_p}, {self.repetition_penalty}"
            )
        if self.use_vllm and self.device_map:
            raise RecipeError("`device_map` is transformers'; with `use_vllm` set `vllm_tensor_parallel_size`")

    def sampling(self, room: int) -> Sampling:
        """How an answer is drawn where the context has `room` tokens left."""
        return Sampling(
            num_generations=1,
            max_tokens=min(self.max_completion_length, room),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

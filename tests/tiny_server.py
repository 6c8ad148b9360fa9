"""vLLM's OpenAI-compatible server with the tiny reasoning LLM, called `judge`."""

from pathlib import Path

from r1v_rl.rollout.vllm_server import vllm_server
from r1v_rl.tiny.parts import resolve_part


def tiny_server(log: Path, **options):
    """A context that yields the base URL."""
    options = {"dtype": "float32", "enforce-eager": True, "max-model-len": 1024, **options}
    model = str(resolve_part("tiny/reasoning_llm"))
    return vllm_server(model, ["judge"], options, timeout_s=400, log=log)

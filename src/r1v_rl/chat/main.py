"""`r1v-rl chat`: ask a model about pictures, once or in a conversation, or serve it with vLLM."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig

from r1v_rl.chat.config import ChatConfig
from r1v_rl.chat.conversation import Conversation
from r1v_rl.chat.display import Display
from r1v_rl.chat.serve import serve
from r1v_rl.config import parse_recipe
from r1v_rl.data.chat import load_processor
from r1v_rl.errors import RecipeError, UserError
from r1v_rl.rollout.engine import StreamingEngine
from r1v_rl.rollout.model_folder import saved_dtype
from r1v_rl.rollout.standalone import standalone_engine
from r1v_rl.scoring.format import prompt_opens_think

HELP = """\
/image PATH   show a picture with the next question (several: once each)
/reset        forget the conversation and its pictures
/quit         leave (or Ctrl-D); Ctrl-C stops an answer"""


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when the question is answered or the conversation left; `--serve` gives back vLLM's own."""
    (config,) = parse_recipe((ChatConfig,), gathered(argv, "--image"), prog="r1v-rl chat")
    if not config.model_name_or_path:
        raise RecipeError("chat needs `--model_name_or_path`: the folder or hub id of a vision-language model")
    processor = load_processor(config.model_name_or_path, config.max_image_tiles)
    if config.serve:
        return serve(config, processor)
    question = _question(config)
    text_config = AutoConfig.from_pretrained(config.model_name_or_path).get_text_config()
    context = min(text_config.max_position_embeddings, config.vllm_max_model_length or sys.maxsize)
    conversation = Conversation(
        processor, context=context, max_images=config.max_images, system_prompt=config.system_prompt
    )
    for path in config.image or []:
        conversation.attach(path)
    if question is not None:
        conversation.ask(question)  # what is wrong with it is said before the model loads
    with _engine(config, processor, context) as engine:
        if question is not None:
            answer(engine, conversation, question, config)
        if config.interactive:
            converse(engine, conversation, config)
    return 0


def answer(engine: StreamingEngine, conversation: Conversation, question: str, config: ChatConfig) -> None:
    """Ask, show the answer while it is written, and keep both."""
    prompt, room = conversation.ask(question)
    sampling = config.sampling(room)
    display = Display(sys.stdout, thinking=prompt_opens_think(prompt.text), show_thinking=config.show_thinking)
    seed = random.getrandbits(31) if config.seed is None else config.seed
    try:
        completion = engine.stream(prompt, sampling, seed=seed, on_text=display.feed)
    finally:
        display.end()
    if completion.is_truncated:
        cause = "`--max_completion_length`" if sampling.most_tokens < room else "the model's context"
        print(f"(cut off after {len(completion.token_ids)} tokens by {cause})", file=sys.stderr)
    conversation.answered(prompt, display.answer)


def converse(engine: StreamingEngine, conversation: Conversation, config: ChatConfig) -> None:
    """Questions and commands from the terminal, or line by line from a pipe, until /quit or the end of input."""
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
        import readline  # noqa: F401  (`input` edits lines and remembers them)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        try:
            _do(line, engine, conversation, config)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("(stopped; the question is not kept)", file=sys.stderr)


def gathered(argv: Sequence[str], key: str) -> list[str]:
    """`--key a --key b` as `--key a b`, which is how recipes' lists are read."""
    values: list[str] = []
    rest: list[str] = []
    collecting = False
    for word in argv:
        if word == key or word.startswith(f"{key}="):
            collecting = True
            values += [word.removeprefix(f"{key}=")] if word != key else []
        elif collecting and not word.startswith("--"):
            values.append(word)
        else:
            collecting = False
            rest.append(word)
    return [*rest, key, *values] if values or key in argv else rest


def _do(line: str, engine: StreamingEngine, conversation: Conversation, config: ChatConfig) -> None:
    command, _, value = line.partition(" ")
    if command == "/image":
        conversation.attach(value.strip().strip("'\""))
    elif command == "/reset":
        conversation.reset()
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif command.startswith("/") and "/" not in command[1:]:
        raise UserError(f"there is no command {command}; there are /image, /reset, /help, /quit")
    elif line:
        answer(engine, conversation, line, config)


def _question(config: ChatConfig) -> str | None:
    if config.question is not None or config.interactive:
        return config.question
    if sys.stdin.isatty():
        raise RecipeError("chat needs `--question`, `--interactive` or `--serve`")
    return sys.stdin.read()


@contextmanager
def _engine(config: ChatConfig, processor: Any, context: int) -> Iterator[StreamingEngine]:
    model = str(config.model_name_or_path)
    with standalone_engine(
        model,
        processor,
        use_vllm=config.use_vllm,
        dtype=saved_dtype(model) if config.dtype == "auto" else config.dtype,
        max_model_len=context,
        max_images=config.max_images,
        device_map=config.device_map,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        kv_cache_memory_bytes=config.vllm_kv_cache_memory_bytes,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
    ) as engine:
        yield engine

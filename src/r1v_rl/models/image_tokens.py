"""What a text tokenizer needs to speak of images: the image tokens, and a chat template that writes them."""

from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, InternVLProcessor, PreTrainedTokenizerBase

from r1v_rl.errors import UserError

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""What InternVL's processor asks of a tokenizer, and how it is written in one that has none of its own."""

_QWEN_VIDEO = "<|video_pad|>"
"""Qwen2.5's own mark for videos, which no prompt of ours holds."""

_FLATTEN = """\
{#- Content blocks become text with a mark where each image goes; the language model's own template follows. -#}
{%- set flat = namespace(messages=[], text='', after_image=false) -%}
{%- for message in messages -%}
{%- if message['content'] is string or not message['content'] -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set flat.text = '' -%}{%- set flat.after_image = false -%}
{%- for block in message['content'] -%}
{%- set piece = 'IMAGE_TOKEN' if block['type'] == 'image' else block['text'] -%}
{%- if flat.after_image and not piece.startswith('\\n') -%}{%- set flat.text = flat.text + '\\n' -%}{%- endif -%}
{%- set flat.text = flat.text + piece -%}{%- set flat.after_image = block['type'] == 'image' -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer image tokens where it has none; a token that it knows already keeps its id.

    Raises:
        UserError: If one of them is missing, is not one token, or is the one that ends or pads a text.
    """
    if not getattr(tokenizer, "context_image_token", None):
        names, known = dict(IMAGE_TOKENS), tokenizer.get_vocab()
        if names["video_token"] not in known and _QWEN_VIDEO in known:
            names["video_token"] = _QWEN_VIDEO  # published InternVL tables have no row to spare
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in names.values()])
        # what `extra_special_tokens` of its constructor would do: the names are saved with the tokenizer
        tokenizer._set_model_specific_special_tokens(names)
    ids: dict[int, str] = {}
    for name in IMAGE_TOKENS:
        token, token_id = getattr(tokenizer, name, None), getattr(tokenizer, f"{name}_id", None)
        encoded = tokenizer.encode(token, add_special_tokens=False) if token else []
        if token_id is None or encoded != [token_id]:
            raise UserError(
                f"`{name}` of the tokenizer must be one token, it is {token!r} and becomes {encoded}: take the image "
                f"tokens out of {tokenizer.name_or_path}/tokenizer_config.json, and new ones are added"
            )
        if token_id in ids:
            raise UserError(f"`{name}` of the tokenizer has the id of `{ids[token_id]}` ({token_id})")
        ids[token_id] = name
    for role in ("eos_token", "pad_token", "bos_token"):
        role_id = getattr(tokenizer, f"{role}_id")
        if role_id in ids:
            raise UserError(f"the tokenizer's `{role}` must not be an image token, it is its `{ids[role_id]}`")


def image_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template if it writes image blocks, else the same behind a part that makes them text.

    Raises:
        UserError: If there is none, or text that it is given does not come out again.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        raise UserError(
            f"the language model's tokenizer must have a chat template; `{tokenizer.name_or_path}` has none "
            f"(put a chat_template.jinja into its folder)"
        )
    flattened = _FLATTEN.replace("IMAGE_TOKEN", tokenizer.context_image_token) + template
    for candidate in (template, flattened):
        if _writes_images(tokenizer, candidate):
            return candidate
    raise UserError(
        f"the chat template of {tokenizer.name_or_path} must write the text of a user's message as it is given, and it "
        f"does not; mend its chat_template.jinja"
    )


def check_round_trip(processor: InternVLProcessor) -> None:
    """What the chat template writes is what the model reads: the tokens of a prompt decode to the prompt.

    Raises:
        UserError: If they do not, or if the template does not open the assistant's turn.
    """
    messages = [_user(_IMAGE, _text("1"), _IMAGE, _text("2"))]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer = processor.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if decoded != prompt:
        raise UserError(
            f"a prompt must decode to itself; the template of {tokenizer.name_or_path} writes {prompt!r}, its tokens "
            f"are {decoded!r}: template and tokenizer belong to different models"
        )
    if not generation_prompt(processor):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} must open the assistant's turn where it is asked to "
            f"(`add_generation_prompt`), and writes nothing there"
        )


def generation_prompt(processor: Any) -> str:
    """What the chat template writes where the assistant is to go on."""
    shown = [
        processor.apply_chat_template([_user(_text("1"))], tokenize=False, add_generation_prompt=g) for g in (0, 1)
    ]
    return shown[1].removeprefix(shown[0])


_IMAGE = {"type": "image"}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _user(*blocks: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def _writes_images(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether each image block becomes one image token before its text, and a text block what plain text becomes."""

    def render(content: Any) -> str:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )

    try:
        seen = render([_IMAGE, _text("one"), _IMAGE, _text("two")])
        plain, blocks = render("one two"), render([_text("one two")])
    except (TemplateError, TypeError, KeyError):
        return False
    image = tokenizer.context_image_token
    places = [seen.find(word) for word in (image, "one", "two")]
    return (
        -1 not in places
        and places == sorted(places)
        and seen.count(image) == 2
        and plain == blocks
        and "one two" in plain
    )

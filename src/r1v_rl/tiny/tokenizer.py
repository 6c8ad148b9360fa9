"""The tiny models' own tokenizer: one token per word, number and written cell; decoding gives the text back exactly."""

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from r1v_rl.data.scene_chains import CELL_NAMES
from r1v_rl.data.scene_questions import CELLS, COLORS, DIGITS, SHAPES, Thing
from r1v_rl.models.image_tokens import IMAGE_TOKENS

END = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", END, *IMAGE_TOKENS.values())
THINK = ("<think>", "</think>")
MAX_NUMBER = 60

_FIRST_WORDS = """
system user assistant yes no red blue green yellow circle square triangle more fewer equal first second
A B C D E How What Which Are Is Look About Describe Explain Answer Think Count Give Please First Let The There In Where
""".split()  # noqa: SIM905
_INNER_WORDS = """
a about and answer Answer Describe Explain Give Put any are as at be between both box boxed by can carefully cell
color compare count describe difference digit each empty equal explain fewer final find first for frequent from give
grid has have how image images in is it largest less list many more most no not number numbers object objects of on
one or other picture pictures put question reason second see shape shapes show smallest step sum sums than that the
then there think to together total two up what where which with yes you your red blue green yellow circle circles
square squares triangle triangles
""".split()  # noqa: SIM905

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'image' %}<IMG_CONTEXT>
{% elif block['type'] == 'text' %}{{ block['text'] | trim }}{% endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
"""
REASONING_TEMPLATE = CHAT_TEMPLATE + "<think>\n{% endif -%}"
DIRECT_TEMPLATE = CHAT_TEMPLATE + "{% endif -%}"


def cell_words() -> list[str]:
    """Every word that a written cell can be, with its leading space: cell by cell, empty and then every object."""
    contents = ["empty", *[Thing(c, s, d).word for c in COLORS for s in SHAPES for d in DIGITS]]
    return [f" {cell}-{content}" for cell in CELLS for content in contents]


def words_in_order() -> list[str]:
    """All tokens beside bytes and special ones. The written cells come last, so that their embeddings are one block."""
    marks = ["\n", "\\boxed{", *[f" {mark}" for mark in ".,:;|-+="]]
    numbers = [f"{space}{number}" for number in range(MAX_NUMBER + 1) for space in ("", " ")]
    inner = [f" {word}" for word in (*CELL_NAMES, *_INNER_WORDS)]
    words = [*THINK, *marks, *numbers, *_FIRST_WORDS, *inner, *cell_words()]
    return [word for word in dict.fromkeys(words) if len(word) > 1 or word == "\n"]


def build_tokenizer(chat_template: str = REASONING_TEMPLATE) -> Qwen2Tokenizer:
    """The tokenizer, with what InternVL's processor asks of one (`start_image_token` and the others).

    Its class is the one that `AutoTokenizer` takes for any Qwen2 model, whatever the folder says. That class reads a
    BPE vocabulary, so ours is the 256 bytes, and every word is an added token: other text becomes bytes, and is kept.
    """
    alphabet = {byte: index for index, byte in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet,
        merges=[],
        unk_token=None,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=IMAGE_TOKENS,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in words_in_order()])
    tokenizer.chat_template = chat_template
    return tokenizer

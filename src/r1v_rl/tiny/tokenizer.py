"""The tiny models' own tokenizer: one token per word, number and written cell; decoding gives the text back exactly."""

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from r1v_rl.data.scene_chains import CELL_NAMES
from r1v_rl.data.scene_questions import CELLS, COLORS, DIGITS, SHAPES, Thing
from r1v_rl.models.compose import IMAGE_TOKENS

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

# A piece is a newline, the box, or one word / number / mark with the space before it, if there is one.
_PIECE = r"\n|\\boxed\{| ?[A-Za-z0-9]+(-[A-Za-z0-9]+)*| ?[^\sA-Za-z0-9]|\s"

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


def vocabulary() -> list[str]:
    """All tokens in id order. The written cells come last, so that their embeddings are one block."""
    marks = ["\n", " ", "\\boxed{", "}", *[f"{space}{mark}" for mark in "?.,:;|-+=" for space in ("", " ")]]
    numbers = [f"{space}{number}" for number in range(MAX_NUMBER + 1) for space in ("", " ")]
    inner = [f" {word}" for word in (*CELL_NAMES, *_INNER_WORDS)]
    return list(dict.fromkeys([*SPECIAL, "<unk>", *THINK, *marks, *numbers, *_FIRST_WORDS, *inner, *cell_words()]))


def build_tokenizer(chat_template: str = REASONING_TEMPLATE) -> PreTrainedTokenizerFast:
    """The tokenizer, with what InternVL's processor asks of one (`start_image_token` and the others)."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(_PIECE), behavior="isolated")
    backend.decoder = Fuse()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=IMAGE_TOKENS,
    )
    tokenizer.chat_template = chat_template
    return tokenizer

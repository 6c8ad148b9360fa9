"""The tiny models' own tokenizer: one token per word, number and written cell; decoding gives the text back exactly."""

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from r1v_rl.data.scene_chains import CELL_NAMES
from r1v_rl.data.scene_questions import COLORS, DIGITS, EMPTY, SHAPES, Thing
from r1v_rl.models.compose import IMAGE_TOKENS

END = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL = (PAD, "<|im_start|>", END, *IMAGE_TOKENS.values())
THINK = ("<think>", "</think>")
MAX_NUMBER = 99

_WORDS = """
system user assistant a about after all an and answer any are as asks assign assistant at be before between both box
boxed by can carefully cell cells color colors compare correct count describe detail difference digit do each empty
equal every explain fewer final find first following for frequent from give given grid has have help helpful how image
images in inside is it its largest less letter list look many more most name no not number numbers object objects of
on one only option or other picture pictures please provide put question questions reason reasoning second see shape
shapes show shown shows smallest so solution step sum sums than that the their them then there these they think this
three to together total two up use user what where which with within yes you your red blue green yellow circle circles
square squares triangle triangles A B C D E How What Which Are Is Look About Describe Explain Answer Think Count Give
You Please First Let The It There In Where
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
    """Every word that a written cell can be, with its leading space: the empty cell, then colour x shape x digit."""
    return [f" {EMPTY}"] + [f" {Thing(c, s, d).word}" for c in COLORS for s in SHAPES for d in DIGITS]


def vocabulary() -> list[str]:
    """All tokens in id order. The written cells come last, so that their embeddings are one block."""
    marks = ["\n", " ", "\\boxed{", "}", *[f"{space}{mark}" for mark in "?.,:;|-+=" for space in ("", " ")]]
    words = dict.fromkeys([*_WORDS, *CELL_NAMES, *map(str, range(MAX_NUMBER + 1))])
    tokens = [*SPECIAL, "<unk>", *THINK, *marks, *[f"{space}{word}" for word in words for space in ("", " ")]]
    cells = cell_words()
    return [t for t in dict.fromkeys(tokens) if t not in cells] + cells


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

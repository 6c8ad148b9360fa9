"""A composed model is its parts: same weights, same text logits, and a folder that transformers loads."""

import pytest
import torch
from random_parts import FAMILIES, random_dinov2, random_llm, save_llm, text_tokenizer
from random_vlm import picture
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    InternVLVisionModel,
)

from r1v_rl.data.scenes import scenes_rows
from r1v_rl.errors import UserError
from r1v_rl.models.compose import compose_vlm, shuffled_features
from r1v_rl.models.image_tokens import IMAGE_TOKENS
from r1v_rl.models.parts import part_of
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tiny.tokenizer import build_tokenizer

ENCODER, LLM = resolve_part("tiny/vision_encoder"), resolve_part("tiny/reasoning_llm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("composed")
    compose_vlm(ENCODER, LLM, path)
    return path


@pytest.fixture(scope="module")
def vlm(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_text_logits_are_the_bare_language_models(folder, vlm):
    llm = AutoModelForCausalLM.from_pretrained(LLM).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.tokenizer(scenes_rows("heldout", 1, 0, num_images=0)[0]["problem"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(vlm(**inputs).logits, llm(**inputs).logits)


def test_vision_features_are_the_bare_encoders_in_raster_order(vlm):
    encoder = InternVLVisionModel.from_pretrained(ENCODER).eval()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = vlm.model.multi_modal_projector(shuffled_features(encoder, pixels))
        assert torch.equal(
            vlm.model.get_image_features(
                pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
            ).pooler_output,
            expected,
        )


def test_a_picture_takes_nine_tokens_and_is_seen(folder, vlm):
    processor = AutoProcessor.from_pretrained(folder)
    rows = scenes_rows("heldout", 2, 0, num_images=1)
    content = [{"type": "image"}, {"type": "text", "text": "How many circles are there?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    logits = []
    for row in rows:
        inputs = processor(text=[text], images=row["images"], return_tensors="pt")
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 9
        with torch.no_grad():
            logits.append(vlm(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_head_and_embedding_are_untied_everywhere(vlm):
    assert vlm.config.tie_word_embeddings is False and vlm.config.text_config.tie_word_embeddings is False
    assert vlm.lm_head.weight.data_ptr() != vlm.get_input_embeddings().weight.data_ptr()


def test_projector_depends_on_the_seed_and_nothing_else_does(folder, tmp_path):
    first = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    state = torch.random.get_rng_state()
    second = compose_vlm(ENCODER, LLM, tmp_path, seed=1).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    changed = {part_of(name) for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"projector"}


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        compose_vlm(ENCODER, LLM, tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_stay_in_every_family_when_image_tokens_are_added(tmp_path, family, tied):
    """Rows are added at the end, as SmolLM2 needs them: the old columns stay, and the new ones stand out nowhere."""
    llm_folder = save_llm(tmp_path / "llm", family, tied=tied)
    llm = AutoModelForCausalLM.from_pretrained(llm_folder).eval()
    compose_vlm(ENCODER, llm_folder, tmp_path / "vlm")
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "vlm")("Two plus two?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, logits = llm(ids).logits, vlm(ids).logits
    vocabulary = expected.shape[-1]
    assert logits.shape[-1] == vocabulary + 4
    assert torch.equal(logits[..., :vocabulary], expected)
    assert (logits[..., vocabulary:] < expected.amax(-1, keepdim=True)).all()
    assert vlm.config.tie_word_embeddings is vlm.config.text_config.tie_word_embeddings is tied


def test_rows_that_a_table_has_to_spare_are_used(tmp_path):
    model = compose_vlm(ENCODER, save_llm(tmp_path / "llm", "qwen2", spare_rows=9), tmp_path / "vlm")
    assert model.get_input_embeddings().weight.shape[0] == len(text_tokenizer()) + 9


def test_a_text_template_learns_to_write_images(tmp_path):
    compose_vlm(ENCODER, save_llm(tmp_path / "llm"), tmp_path / "vlm")
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    image, say = {"type": "image"}, lambda text: {"type": "text", "text": text}

    def render(*content):
        messages = [{"role": "user", "content": list(content)}]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert render(say("Hello")) == "<|user|>Hello<|end|><|assistant|>"
    assert render(image, say("Which?")) == "<|user|><IMG_CONTEXT>\nWhich?<|end|><|assistant|>"
    assert render(image, image, say("\nWhich?")) == "<|user|><IMG_CONTEXT>\n<IMG_CONTEXT>\nWhich?<|end|><|assistant|>"
    assert render(say("Is "), image, say("red?")) == "<|user|>Is <IMG_CONTEXT>\nred?<|end|><|assistant|>"
    plain = processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert plain == "<|user|>Hello<|end|>"


def test_wide_pictures_become_tiles_and_a_thumbnail(tmp_path):
    model = compose_vlm(random_dinov2(), LLM, tmp_path, image_size=56, max_image_tiles=6)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=[processor.image_token], images=[picture(0, 300, 100)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, 56, 56)  # three tiles of the picture, and all of it
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4 * 4
    assert model(**inputs).logits.isfinite().all()


def test_bfloat16_parts_are_joined_in_bfloat16(tmp_path):
    compose_vlm(ENCODER, LLM, tmp_path, dtype="bfloat16")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def _with_template(template):
    tokenizer = text_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _with_image_tokens(**tokens):
    tokenizer = text_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: _with_template("{{ messages[0]['content'] | upper }}"), "must write the text of a user's message"),
        (lambda: _with_template("{{ messages[0]['content'] }}"), "must open the assistant's turn"),
        (lambda: _with_image_tokens(context_image_token="<|pad|>"), "`start_image_token` of the tokenizer must be one"),
        (lambda: _with_image_tokens(**dict.fromkeys(IMAGE_TOKENS, "<|user|>")), "has the id of `start_image_token`"),
        (
            lambda: _with_image_tokens(**dict(zip(IMAGE_TOKENS, ["<|end|>", "a", "b", "c"], strict=True))),
            "`eos_token` must not be an image token",
        ),
    ],
)
def test_tokenizers_that_cannot_carry_images_are_refused(tmp_path, tokenizer, message):
    with pytest.raises(UserError, match=message):
        compose_vlm(ENCODER, random_llm("llama", tied=True), tmp_path, tokenizer=tokenizer())


def test_a_prompt_that_does_not_decode_to_itself_is_refused(tmp_path):
    tokenizer = text_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("1", "l")
    with pytest.raises(UserError, match="a prompt must decode to itself"):
        compose_vlm(ENCODER, random_llm("llama", tied=True), tmp_path, tokenizer=tokenizer)


def test_language_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="received a `gpt2`"):
        compose_vlm(ENCODER, GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=9)), tmp_path)
    with pytest.raises(UserError, match="`language_model` must be a model folder"):
        compose_vlm(ENCODER, tmp_path / "nothing", tmp_path)
    random_llm("llama", tied=True).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="must hold its tokenizer"):
        compose_vlm(ENCODER, tmp_path / "bare", tmp_path)


def test_a_grid_that_the_pixel_shuffle_cannot_halve_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"multiple of 2 for `downsample_ratio` 0\.5"):
        compose_vlm(random_dinov2(), LLM, tmp_path, image_size=70)

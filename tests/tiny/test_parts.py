"""The shipped parts are the ones that were built, small enough, and what they are said to be."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, InternVLVisionModel

from r1v_rl.errors import RecipeError
from r1v_rl.tiny.language import text_accuracy
from r1v_rl.tiny.parts import ASSETS, checksums, read_checksums, resolve_part
from r1v_rl.tiny.tokenizer import build_tokenizer

MAX_BYTES = 12_000_000


def test_files_are_the_ones_that_were_built():
    assert checksums(ASSETS) == read_checksums()


def test_all_parts_together_stay_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= MAX_BYTES


def test_a_part_is_found_by_name_and_a_wrong_name_lists_them(tmp_path):
    assert (resolve_part("tiny/vision_encoder") / "config.json").is_file()
    assert resolve_part(tmp_path) == tmp_path
    with pytest.raises(RecipeError, match="tiny/reasoning_llm"):
        resolve_part("tiny/encoder")


@pytest.mark.parametrize("part", ["substitute_llm", "reasoning_llm"])
def test_language_models_load_untied_with_the_tokenizer_they_were_taught_with(part):
    model = AutoModelForCausalLM.from_pretrained(resolve_part(f"tiny/{part}"))
    tokenizer = AutoTokenizer.from_pretrained(resolve_part(f"tiny/{part}"))
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template.endswith("<think>\n{% endif -%}") == (part == "reasoning_llm")


def test_the_vision_encoder_loads():
    encoder = InternVLVisionModel.from_pretrained(resolve_part("tiny/vision_encoder"))
    assert encoder(torch.zeros(1, 3, 96, 96)).last_hidden_state.shape == (1, 37, 128)


def test_the_reasoning_model_is_right_when_it_looks_and_often_wrong_when_it_guesses():
    model = AutoModelForCausalLM.from_pretrained(resolve_part("tiny/reasoning_llm"))
    assert text_accuracy(model, "think", n=100, seed=5, careful=True)["all"] >= 0.75
    assert text_accuracy(model, "think", n=100, seed=5, careful=False)["all"] <= 0.6

"""`r1v-rl chat` as a user meets it: pictures, questions, a conversation, and one line for every mistake."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from random_vlm import picture, random_vlm, save_random_vlm

from r1v_rl.chat.config import ChatConfig
from r1v_rl.chat.conversation import Conversation
from r1v_rl.chat.display import Display
from r1v_rl.chat.main import gathered
from r1v_rl.chat.main import main as chat_main
from r1v_rl.chat.serve import serve, server_options
from r1v_rl.cli import main
from r1v_rl.errors import DataError, RecipeError
from r1v_rl.rollout.engine import Sampling
from r1v_rl.rollout.standalone import standalone_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_random_vlm(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def processor():
    return random_vlm()[1]


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        picture(i, 64, 32).save(path)
    return paths


def shown(text: str, *, pieces: int = 1, thinking: bool = False, show: bool = True, terminal: bool = False):
    """What the display writes of a text that comes in pieces of that length, and the answer it keeps."""
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    display = Display(out, thinking=thinking, show_thinking=show)
    for i in range(0, len(text), pieces):
        display.feed(text[i : i + pieces])
    display.end()
    return out.getvalue(), display.answer


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 100])
def test_thinking_is_shown_apart_however_the_text_is_cut(pieces, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "<think>\n2 < 3, so </b> fewer\n</think>\n\nIt is \\boxed{fewer}"
    written, answer = shown(text, pieces=pieces)
    assert written.split("\n\nAnswer:\n") == [
        "Thinking:\n2 < 3, so </b> fewer\n",
        "It is \\boxed{fewer}\n",
    ]
    assert answer == "It is \\boxed{fewer}"
    assert shown(text.removeprefix("<think>"), pieces=pieces, thinking=True) == (written, answer)
    on_terminal, _ = shown(text, pieces=pieces, terminal=True)
    assert on_terminal.startswith("\x1b[2m2 < 3") and on_terminal.endswith("\x1b[0m\n\nIt is \\boxed{fewer}\n")
    assert shown(text, pieces=pieces, show=False)[0] == "(6 words of thinking)\nAnswer:\nIt is \\boxed{fewer}\n"


def test_what_is_not_thinking_stays(monkeypatch):
    assert shown("4, not <think> again") == ("4, not <think> again\n", "4, not <think> again")
    assert shown("without an end", thinking=True) == ("Thinking:\nwithout an end\n", "")
    assert shown("ends in <thi") == ("ends in <thi\n", "ends in <thi")
    assert shown("\x1b]0;title\x07red\x9b2J", terminal=True)[0] == "]0;titlered2J\n"


def test_a_conversation_keeps_pictures_in_their_turns(processor, pictures):
    talk = Conversation(processor, context=500, max_images=3, system_prompt="Be brief.")
    talk.attach(pictures[0])
    talk.attach(pictures[1])
    prompt, room = talk.ask("first <image> second <image> which?")
    assert [block["type"] for block in prompt.example.messages[1]["content"]] == ["text", "image"] * 2 + ["text"]
    assert room == 500 - len(prompt.prompt_ids)
    talk.answered(prompt, "the second")
    talk.attach(pictures[2])
    prompt, _ = talk.ask("And now?")
    assert [message["role"] for message in prompt.example.messages] == ["system", "user", "assistant", "user"]
    assert [block["type"] for block in prompt.example.messages[-1]["content"]] == ["image", "text"]
    assert [image.tobytes() for image in prompt.images] == [Image.open(p).convert("RGB").tobytes() for p in pictures]
    with pytest.raises(DataError, match=r"one too many: .* 3 \(`--max_images`\)"):
        talk.attach(pictures[0])
    talk.reset()
    prompt, _ = talk.ask("Again")
    assert not prompt.images and [message["role"] for message in prompt.example.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (" \n", "the question is empty"),
        ("<image> or <image>?", r"2 <image> mark\(s\) for 1 picture"),
        ("this <IMG_CONTEXT>?", "marked by <image>, not by <IMG_CONTEXT>"),
        ("red " * 200, r"has 2\d\d tokens with its 1 picture\(s\), and the context holds 200"),
    ],
)
def test_a_question_that_cannot_be_asked(processor, pictures, question, message):
    talk = Conversation(processor, context=200, max_images=3)
    talk.attach(pictures[0])
    with pytest.raises(DataError, match=message):
        talk.ask(question)


def test_streamed_text_is_that_of_the_completion(model, processor, pictures):
    """And the completion is the one that the engine gives without streaming."""
    talk = Conversation(processor, context=500, max_images=3)
    talk.attach(pictures[0])
    prompt, _ = talk.ask("How many red shapes?")
    sampling = Sampling(num_generations=1, max_tokens=20)
    settings = {"use_vllm": False, "dtype": "float32", "max_model_len": 500, "max_images": 3, "device_map": "cpu"}
    with standalone_engine(model, processor, **settings) as engine:
        pieces: list[str] = []
        completion = engine.stream(prompt, sampling, seed=3, on_text=pieces.append)
        assert "".join(pieces) == completion.text and len(pieces) > 5
        assert engine.generate([prompt], sampling, seed=3) == [[completion]]


def test_an_interactive_session(model, pictures, tmp_path, monkeypatch, capsys):
    """Questions, commands and mistakes come from a pipe, and `/quit` ends it."""
    lines = ["How many?", f"/image {tmp_path}/nope.png", f"/image {pictures[2]}", "/paint", "Which?", "/reset", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "never asked"])))
    words = ["--model_name_or_path", model, "--max_completion_length", "8", "--device_map", "cpu"]
    images = ["--image", pictures[0], "--image", pictures[1]]
    assert main(["chat", *words, *images, "--interactive"]) == 0
    error = capsys.readouterr().err
    assert error.count("(cut off after 8 tokens by `--max_completion_length`)") == 2
    assert f"error: image {tmp_path}/nope.png does not exist\n" in error
    assert "error: there is no command /paint; there are" in error


def test_mistakes_are_one_line_and_exit_code_2(model, pictures, tmp_path, capsys):
    Image.new("1", (12000, 12000)).save(tmp_path / "huge.png")
    (tmp_path / "cut.png").write_bytes(Path(pictures[0]).read_bytes()[:100])
    (tmp_path / "text.png").write_text("hello")
    many = [word for _ in range(17) for word in ("--image", pictures[0])]
    start = ["chat", "--model_name_or_path", model, "--question", "How many?"]
    for words, message in [
        (["--image", "nowhere.png"], "image nowhere.png does not exist"),
        (["--image", str(tmp_path)], "is not a regular file"),
        (["--image", str(tmp_path / "cut.png")], "is damaged"),
        (["--image", str(tmp_path / "text.png")], "is not an image of a known format"),
        (["--image", str(tmp_path / "huge.png")], "has 12000 x 12000 pixels, above 40 megapixels; scale it down"),
        (["--image", "https://example.org/a.png"], "is an address; images are never fetched"),
        (many, "is one too many: a conversation may hold 16"),
        (["--question", "red " * 2000], "the context holds 1024 and an answer too"),
        (["--temperature", "-1"], "`temperature` must be 0 or more"),
        (["--imge", "a.png"], "`imge` is not a recipe key. Did you mean `image`?"),
        (["--model_name_or_path", str(tmp_path)], "must be a model folder with its processor"),
        (["--serve", "--host", "0.0.0.0"], "set the environment variable VLLM_API_KEY"),
    ]:
        assert main([*start, *words]) == 2, words
        error = capsys.readouterr().err.strip()
        assert message in error and error.startswith("r1v-rl chat: error: ")
        assert error.count("\n") == 0 or "model folder" in message
    with pytest.raises(RecipeError, match="needs `--model_name_or_path`"):
        chat_main([])


def test_repeated_keys_are_gathered():
    assert gathered(["--image", "a", "--question", "q", "--image=b", "c"], "--image") == [
        "--question", "q", "--image", "a", "b", "c",
    ]  # fmt: skip
    assert gathered(["--question", "q"], "--image") == ["--question", "q"]


def test_the_servers_options(model, processor, monkeypatch):
    config = ChatConfig(model_name_or_path=model, serve=True, max_images=2, vllm_max_model_length=512, seed=4)
    options = server_options(config, processor)
    assert options["limit-mm-per-prompt"] == {"image": 2} and options["max-model-len"] == 512
    assert options["override-generation-config"]["repetition_penalty"] == 1.05
    assert options["reasoning-parser"] == "deepseek_r1" and options["dtype"] == "float32"
    assert not any("api-key" in name for name in options)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RecipeError, match=r"other machines \(`host` 0\.0\.0\.0\)"):
        serve(ChatConfig(model_name_or_path=model, host="0.0.0.0"), processor)
    with pytest.raises(RecipeError, match=r"a server that takes weights needs a key: .*VLLM_API_KEY"):
        serve(ChatConfig(model_name_or_path=model, takes_weights=True), processor)
    assert "VLLM_API_KEY" not in os.environ

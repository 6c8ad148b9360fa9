"""The shape of the code base, read from its syntax trees: imports point one way, files and functions stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "r1v_rl"
LAYERS = (
    "runtime errors types secret_values recipe_values config durable state_files checkpoints",
    "tracking",
    "data",
    "models",
    "small",
    "tiny",
    "assembly",
    "scoring",
    "rollout",
    "evaluate",
    "chat",
    "training",
    "distill",
    "sft",
    "grpo",
    "chain",
    "check",
    "plan",
    "cli",
    "__main__ startup",
)
"""Lowest first; a module imports from its own layer and those below."""
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
BANNED_CALLS = {"eval", "exec", "sympify", "parse_expr", "pickle.load", "pickle.loads", "yaml.load", "os.system"}

source_files = pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))


def imported_parts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, first name below `r1v_rl`) of every import of our own, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [alias.name for alias in node.names] if node.module == "r1v_rl" else [node.module or ""]
            prefix = "r1v_rl." if node.module == "r1v_rl" else ""
            modules = [prefix + name for name in names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            if module.startswith("r1v_rl."):
                yield node.lineno, module.split(".")[1]


def called_name(call: ast.Call) -> str:
    return ast.unparse(call.func)


@source_files
def test_imports_point_one_way(path):
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the package's front door names what users import
    assert part in LEVELS, f"{part} has no layer: add it to LAYERS"
    upward = [
        f"line {line}: {part} must not import {imported}"
        for line, imported in imported_parts(ast.parse(path.read_text()))
        if LEVELS[imported] > LEVELS[part]
        or (LEVELS[imported] == LEVELS[part] and part != imported and LEVELS[part] > 0)
    ]
    assert not upward, "\n".join(upward)


@source_files
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} (line {node.lineno}) has {length} lines"


@source_files
def test_nothing_runs_text_as_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert called_name(node) not in BANNED_CALLS, f"line {node.lineno}: {called_name(node)}"
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert not (keyword.arg == "shell" and not is_false), f"line {node.lineno}: shell="
                assert not (keyword.arg == "trust_remote_code" and is_true), f"line {node.lineno}: trust_remote_code"
                assert not (keyword.arg == "weights_only" and not is_true), f"line {node.lineno}: weights_only"


READ_WITHOUT_WEIGHTS = ("Config", "AutoTokenizer", "AutoProcessor")


@source_files
def test_models_are_read_by_load_weights_alone(path):
    """It takes safetensors; `from_pretrained` would open a pickle where there are none. A GGUF file has no code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and called_name(node).endswith(".from_pretrained"):
            owner = called_name(node).removesuffix(".from_pretrained")
            keywords = {keyword.arg for keyword in node.keywords}
            allowed = owner.endswith(READ_WITHOUT_WEIGHTS) or keywords & {"use_safetensors", "gguf_file"}
            assert allowed, f"line {node.lineno}: {owner}.from_pretrained opens pickles: take load_weights"


@source_files
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip()


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ("from r1v_rl.grpo.loss import policy_loss", [(1, "grpo")]),
        ("def f():\n    import r1v_rl.cli", [(2, "cli")]),
        ("from r1v_rl import config, cli", [(1, "config"), (1, "cli")]),
        ("import torch", []),
    ],
)
def test_the_walk_finds_planted_imports(planted, expected):
    assert list(imported_parts(ast.parse(planted))) == expected

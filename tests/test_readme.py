"""The README's file tree names every source file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "r1v_rl"


def test_the_readme_has_one_line_for_every_source_file():
    lines = (ROOT / "README.md").read_text().splitlines()
    named = {line.split()[0] for line in lines if line.strip()}
    missing = {}
    for path in SOURCE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if docstring and str(path.relative_to(SOURCE)) not in named:
            missing[str(path.relative_to(SOURCE))] = " ".join(docstring.split("\n\n")[0].split())
    assert not missing, "README.md, section Files, lacks:\n" + "\n".join(f"{k:<32}{v}" for k, v in missing.items())

"""The shipped tiny parts: where they are, and whether they are whole."""

import hashlib
from pathlib import Path

from r1v_rl import small
from r1v_rl.errors import RecipeError

ASSETS = Path(__file__).parent / "assets"
PARTS = ("vision_encoder", "substitute_llm", "reasoning_llm")
CHECKSUMS = ASSETS / "SHA256SUMS.txt"


def resolve_part(name: str | Path) -> Path:
    """The folder that a recipe names: `tiny/<part>` is a shipped one, `small/<part>` a real one, else it is a path."""
    if str(name).startswith(small.PREFIX) and not Path(name).exists():
        return small.small_part(str(name))
    if Path(name).exists() or not str(name).startswith("tiny/"):
        return Path(name)
    part = str(name).removeprefix("tiny/")
    if part not in PARTS:
        raise RecipeError(f"the shipped tiny parts are {', '.join('tiny/' + p for p in PARTS)}; received {name!r}")
    return ASSETS / part


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file under the folder's parts, by path relative to it."""
    files = sorted(path for part in PARTS for path in (folder / part).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_checksums(folder: Path) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in checksums(folder).items()]
    (folder / "SHA256SUMS.txt").write_text("".join(lines))


def read_checksums() -> dict[str, str]:
    """The recorded sha256 of every shipped file."""
    rows = [line.split(maxsplit=1) for line in CHECKSUMS.read_text().splitlines()]
    return {name: digest for digest, name in rows}

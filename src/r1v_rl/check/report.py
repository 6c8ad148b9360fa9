"""What a check found, line by line: a fault does not keep the rest from being looked at."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1v_rl.data.sources import OWN_DATASETS
from r1v_rl.errors import UserError
from r1v_rl.tiny.parts import resolve_part
from r1v_rl.tracking.manifest import RUN_MANIFEST

_WIDTH = 9


class NotHere(Exception):
    """A model or file that cannot be looked at on this machine; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the recipe is checked: which of its references may be missing."""

    missing_ok: bool = False
    """The recipe is for another machine."""
    made: Mapping[Path, str] = field(default_factory=dict)
    """Folder -> the earlier stage of the chain that makes it."""

    def require(self, key: str, value: str | None) -> None:
        """Passes where the named model, part or data can be read here, or where reading it should say what is wrong.

        Raises:
            NotHere: Where it may be missing, and is.
        """
        if not value or value in OWN_DATASETS:
            return
        path = Path(value)
        for folder, stage in self.made.items():
            if folder in (path, *path.parents) and not (folder / RUN_MANIFEST).exists():
                raise NotHere(f"`{key}` {value} is made by stage {stage}")
        if self.missing_ok and not _is_here(value):
            raise NotHere(f"`{key}` {value} is not on this machine")


@dataclass
class Report:
    """Faults, and what could not be looked at."""

    place: Place = field(default_factory=Place)
    prefix: str = ""
    """Put before the subject of every fault: the stage's name in a chain."""
    faults: list[str] = field(default_factory=list)

    def look(self, subject: str, find: Callable[[], tuple[str, Any]]) -> Any:
        """What `find` found, its line printed; None where a user's mistake was found instead, or nothing is here."""
        try:
            line, found = find()
        except UserError as error:
            self.faults.append(f"{self.prefix}{subject}: {error}")
            print(f"  {subject:<{_WIDTH}} FAULT", flush=True)
            return None
        except NotHere as reason:
            print(f"  {subject:<{_WIDTH}} not checked here: {reason}", flush=True)
            return None
        print(f"  {subject:<{_WIDTH}} {line}", flush=True)
        return found

    def finish(self) -> None:
        """Raises every fault at once."""
        if self.faults:
            raise UserError("\n".join([f"{len(self.faults)} fault(s)", *self.faults]))


def _is_here(name: str) -> bool:
    """Whether it is a path, a shipped part (whose package may not be installed), or a hub id in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if os.path.exists(name) or resolve_part(name).exists():
            return True
    except UserError:
        return False
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False

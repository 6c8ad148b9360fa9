"""What a recipe's text means: YAML of plain values, and each value as its key's annotation wants it."""

import enum
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from r1v_rl.errors import RecipeError
from r1v_rl.secret_values import check_holds_no_secret

MAX_RECIPE_BYTES = 1_000_000

_TRUE, _FALSE, _NULL = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null", "~"}


class _RecipeLoader(yaml.SafeLoader):
    """Plain values only: duplicate keys and aliases are refused, and `1e-6` is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date that there is not, a number of more digits than Python reads
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a name", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key `{key}` is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file; `RecipeError` names file and line, or file and key where a secret stands in it."""
    if not path.is_file():
        raise RecipeError(f"--config must name a YAML file, received {path}, which is not a file")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: a recipe holds at most {MAX_RECIPE_BYTES} bytes, this file {path.stat().st_size}")
    try:
        content = _parsed(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: a recipe is UTF-8 text; {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not a recipe: {getattr(error, 'problem', None) or error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping `key: value`, this file holds a {type(content).__name__}")
    check_holds_no_secret(content, f"{path}: ")
    return content


def _parsed(text: str) -> Any:
    try:
        return _RecipeLoader(text).get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("lists and mappings are nested too deep") from error


def scalar(text: str) -> Any:
    """A command line's word as a recipe file would read it: a number, true, null, [list], {mapping}, or the text."""
    try:
        value = _parsed(text)
    except yaml.YAMLError:
        return text
    is_flow = text.lstrip().startswith(("[", "{"))  # "Last: the answer" is text, not a mapping
    kinds = (list, dict) if is_flow else (NoneType, bool, int, float)
    return value if isinstance(value, kinds) and text.strip() else text


def convert(value: Any, annotation: Any) -> Any:
    """The value as `annotation`, or `ValueError`; a union takes the first member that the value already is, then the
    first that it can be turned into, text last."""
    origin = get_origin(annotation) or annotation
    if origin in (Union, UnionType):
        return _convert_union(value, get_args(annotation))
    if origin is Literal:
        return _convert_choice(value, {choice: choice for choice in get_args(annotation)})
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _convert_choice(value, {member.value: member for member in origin})
    if origin in (list, tuple):
        item = (get_args(annotation) or (Any,))[0]
        only = value[0] if isinstance(value, list) and len(value) == 1 else value
        items = _from_flow(only, "[") if isinstance(only, str) else value
        return [convert(v, item) for v in (items if isinstance(items, list | tuple) else [items])]
    converter = _CONVERTERS.get(origin)
    if converter is not None:
        return converter(value)
    if origin is Any or isinstance(value, origin):
        return value
    raise ValueError


def takes_list(annotation: Any) -> bool:
    """Whether a value of this annotation may be a list."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any((get_origin(member) or member) in (list, tuple) for member in members)


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None and NoneType in members:
        return None
    if isinstance(value, str):
        nulls = {"null"} if str in members else _NULL  # "none" is a value of many a text key
        if value.lower() in nulls and NoneType in members:
            return None
        if value.lstrip().startswith("{") and any((get_origin(m) or m) is dict for m in members):
            return _to_dict(value)
    if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
        members = tuple(member for member in members if member is not str)  # text must name a member
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return value
    for member in sorted(members, key=lambda m: m is str):
        try:
            return convert(value, member)
        except ValueError:
            continue
    raise ValueError


def _convert_choice(value: Any, choices: Mapping[Any, Any]) -> Any:
    """YAML reads a bare `no` as false, which is a value of several strategies."""
    if value in choices.values():
        return value
    if value is False and "no" in choices:
        value = "no"
    if isinstance(value, str | int) and value in choices:
        return choices[value]
    raise ValueError


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if isinstance(value, str | int) and text in _TRUE | _FALSE:
        return text in _TRUE
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    number = _to_float(value)
    if not number.is_integer():
        raise ValueError
    return int(value) if isinstance(value, int) else int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    try:
        number = float(value)
    except ValueError:
        raise ValueError from None
    if math.isnan(number):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError
    return str(value)


def _to_dict(value: Any) -> dict:
    if isinstance(value, str):
        value = _from_flow(value, "{")
    if not isinstance(value, dict):
        raise ValueError
    return value


def _to_none(value: Any) -> None:
    if value is None or (isinstance(value, str) and value.lower() in _NULL):
        return None
    raise ValueError


_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    dict: _to_dict,
    NoneType: _to_none,
}


def _from_flow(text: str, opening: str) -> Any:
    """A list or mapping written on one line, as on a command line; other text as it stands."""
    if not text.lstrip().startswith(opening):
        return text
    try:
        return _parsed(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not readable as YAML: {getattr(error, 'problem', error)}") from error


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    NoneType: "null",
}


def describe(annotation: Any) -> str:
    """An annotation in a user's words."""
    origin = get_origin(annotation) or annotation
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in get_args(annotation)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in origin)
    if origin in (list, tuple):
        return "a list" + "".join(f" of {describe(item)}" for item in get_args(annotation)[:1] if item is not Any)
    return _WORDS.get(origin, getattr(origin, "__name__", str(origin)))


def plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, NoneType | bool | int | float | str) else str(value)

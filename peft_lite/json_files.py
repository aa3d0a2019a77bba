"""JSON files from outside, read strictly: bounded, finite, each key once, each field of its type.

`read_object` reads a file; `check_types` compares the fields with the annotations of a dataclass.
Both raise one ValueError of one line that names the file and the field.
"""

import json
import math
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

MAX_BYTES = 64 * 2**20  # more than any config, index or result has


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: no such file, one that is too large, not UTF-8, not JSON or no object, that
            names a key twice, nests too deep or holds a number that is not finite.
    """
    return parse_object(read_text(path, max_bytes), str(path))


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """The content of a text file.

    Raises:
        ValueError: no such file, one that is too large, or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"it has {size:,} bytes, at most {max_bytes:,} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or too large
        raise ValueError(f"cannot read {path}: {error}") from None


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a folder may lack: {} where it does.  Raises ValueError as
    `read_object`.
    """
    return read_object(path) if path.exists() else {}


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The same for a text, with `where` it stood for the message."""
    value = parse(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {where}: it holds {_kind(value)}, not an object")
    return value


def parse(text: str, where: str) -> Any:
    """The value of a text, of whatever kind; as strict as `parse_object`."""
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"cannot read {where}: it nests too deep") from None
    except ValueError as error:
        raise ValueError(f"cannot read {where}: {error}") from None


def check_types(fields: Mapping[str, Any], hints: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError for the first field whose value is not of its annotated type.

    Args:
        fields: name -> value, as read from JSON.
        hints: name -> annotation, as `typing.get_type_hints` gives them; a field without one
            is not looked at.
        where: the beginning of the message, `path: `.
    """
    for name, value in fields.items():
        if name in hints and not conforms(value, hints[name]):
            raise ValueError(f"{where}{name} is {short(value)}, must be {describe(hints[name])}")


def conforms(value: object, hint: Any) -> bool:
    """Whether a value read from JSON is of an annotated type; an int serves as a float."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(conforms(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, item = args
        return isinstance(value, Mapping) and all(
            conforms(k, key) and conforms(v, item) for k, v in value.items()
        )
    if origin is tuple and args[-1] is not Ellipsis:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(args)
            and all(map(conforms, value, args))
        )
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(conforms(v, args[0]) for v in value)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """An annotated type in words: `a whole number or null`."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(json.dumps(arg) for arg in args)
    if hint is None or hint is type(None):
        return "null"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "an object"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "a list"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def short(value: object) -> str:
    """A value for a message: cut, and free of control characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str, limit: int = 200) -> str:
    """A text from a file, or a library's words about it, for a message: one line, cut, and free
    of what a terminal obeys.
    """
    text = text if text.isprintable() else json.dumps(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {short(twice)} stands twice")
    return values


def _constant(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large")
    return value


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )

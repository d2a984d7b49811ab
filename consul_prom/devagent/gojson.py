"""JSON documents read as Go's encoding/json reads them into a struct that allows no unknown field.

Keys match without regard to case. null is the same as an absent key or, in a list or a map, as the zero value. A wrong
type is an error with Go's words.
Source: https://pkg.go.dev/encoding/json#Unmarshal
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from consul_prom.devagent import durations
from consul_prom.devagent.errors import Unsupported

Reader = Callable[[Any, str], Any]
"""Turns the JSON value of the field with this path into ours; ValueError has Go's message."""


def decode(body: bytes) -> Any:
    """The first JSON value of the body: like Go's decoder, this does not look at what follows it."""
    text = body.decode("utf-8", "replace").lstrip()
    if not text:
        raise ValueError("EOF")
    return json.JSONDecoder(parse_constant=_refuse).raw_decode(text)[0]


def struct(fields: Mapping[str, Reader], value: Any, path: str = "") -> dict[str, Any]:
    """The values of a JSON object under the names of `fields`; `path` is where the object stands."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _mismatch(value, path, "struct")
    names = {name.lower(): name for name in fields}
    result: dict[str, Any] = {}
    for key, item in value.items():
        name = names.get(key.lower())
        if name is None:
            raise ValueError(f"json: unknown field {durations.quoted(key)}")
        if item is not None:
            result[name] = fields[name](item, f"{path}.Alias.{name}")
    return result


def text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _mismatch(value, path, "string")
    return value


def integer(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _mismatch(value, path, "int")
    return value


def boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise _mismatch(value, path, "bool")
    return value


def items(value: Any, path: str, type_name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _mismatch(value, path, type_name)
    return value


def texts(value: Any, path: str) -> list[str]:
    return ["" if item is None else text(item, path) for item in items(value, path, "[]string")]


def mapping(read: Reader, type_name: str, *, zero: Callable[[], Any]) -> Reader:
    """Read an object whose values *read* reads; `zero()` is the value that null stands for."""

    def read_mapping(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _mismatch(value, path, f"map[string]{type_name}")
        return {key: zero() if item is None else read(item, path) for key, item in value.items()}

    return read_mapping


def duration(value: Any, _path: str) -> int:
    """Nanoseconds: a text with units, or a bare number; as in Consul, other types count as absent."""
    if isinstance(value, str):
        return durations.parse(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value)
    return 0


def unsupported(value: Any, path: str) -> None:
    if value:
        raise Unsupported(path.rpartition(".")[2])


def ignored(_value: Any, _path: str) -> None:
    """Consul reads the field and makes no use of it."""


def _refuse(constant: str) -> None:
    """NaN and Infinity, which are Python's and no JSON."""
    raise ValueError(f"invalid character '{constant[0]}' looking for beginning of value")


def _mismatch(value: Any, path: str, wanted: str) -> ValueError:
    kinds = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    kind = f"number {value}" if isinstance(value, float) and wanted == "int" else kinds[type(value)]
    return ValueError(
        f"json: cannot unmarshal {kind} into Go {f'struct field {path}' if path else 'value'} of type {wanted}"
    )

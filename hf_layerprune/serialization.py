"""Frozen dataclasses as JSON values, and back by the types of their fields."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from .errors import LayerPruneError
from .plan import Edit, LayerPlan

LABEL = re.compile(r"\d{1,5}((\|\d{1,5})*|(\+\d{1,5})*)")
MAX_WHOLE = 2**63
WANTED = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def to_json_value(value: Any) -> Any:
    """Turn a value into what JSON has: an edit into its label, a float that is not finite into text."""
    if isinstance(value, LayerPlan):
        return value.to_dict()
    if isinstance(value, Edit):
        return value.label
    if is_dataclass(value):
        return {each.name: to_json_value(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {to_json_value(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json_value(kind: Any, data: Any, name: str) -> Any:
    """Turn what [`to_json_value`] made back into a value of type `kind`; errors call it `name`.

    Fields with defaults may be missing, and entries that are no fields are ignored.

    Raises:
        [`LayerPruneError`]: if a value is missing or has the wrong type.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return data
    if origin in (Union, UnionType):  # X | None
        return None if data is None else from_json_value(arguments[0], data, name)
    if origin is Literal:
        return data if data in arguments else _refuse(name, data, f"one of {', '.join(arguments)}")
    if origin is LayerPlan:
        return LayerPlan.from_dict(data)
    if origin is Edit:
        is_label = isinstance(data, str) and LABEL.fullmatch(data)
        return Edit.from_label(data) if is_label else _refuse(name, data, 'a label such as "7", "4|5" or "4+5"')
    if is_dataclass(origin):
        return _record(kind, _checked(dict, data, name), name)
    if origin is tuple:
        return tuple(from_json_value(arguments[0], item, name) for item in _checked(list, data, name))
    if origin is dict:
        items, (key_kind, item_kind) = _checked(dict, data, name).items(), arguments
        return {
            from_json_value(key_kind, key, name): from_json_value(item_kind, item, f"{name}.{key}")
            for key, item in items
        }
    if origin is float and (data in ("nan", "inf", "-inf") or (type(data) is int and abs(data) < MAX_WHOLE)):
        return float(data)
    return _checked(origin, data, name)


def _record(kind: Any, data: dict[str, Any], name: str) -> Any:
    origin, given = get_origin(kind) or kind, {}
    hints = get_type_hints(origin)
    for field in fields(origin):
        if field.name in data:
            hint = hints[field.name]
            hint = hint[get_args(kind)] if getattr(hint, "__parameters__", ()) else hint  # `Key` of `Scores[Edit]`
            given[field.name] = from_json_value(hint, data[field.name], f"{name}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise LayerPruneError(f"{name} lacks {field.name}")
    return origin(**given)


def _checked(kind: type, data: Any, name: str) -> Any:
    if type(data) is not kind or (kind is int and abs(data) >= MAX_WHOLE):
        _refuse(name, data, WANTED[kind])
    return data


def _refuse(name: str, data: Any, wanted: str) -> NoReturn:
    raise LayerPruneError(f"{name}={data!r:.80} must be {wanted}")

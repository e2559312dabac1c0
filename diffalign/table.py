"""Tables of names: one way to turn a name, or a section of a config, into an object.

A table is a dict of name -> "module:Attribute", so it is lazy and can be grepped. A dotted path names anyone's own:
"my_package.my_module:Thing". A section is {"name": ..., keyword: value, ...}, and its keywords are the constructor's.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

Table = Mapping[str, str]
Section = str | Mapping[str, Any]


def unknown(what: str, got: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there: the nearest one, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown {what} {got!r}{hint} known are {', '.join(names) or 'none'}")


def resolve(table: Table, name: str, what: str) -> Any:
    """The class or function that a name of the table, or a dotted path "package.module:Thing", stands for.

    Raises:
        ValueError: an unknown name, or a dotted path that cannot be imported.
    """
    target = table.get(name, name)
    if ":" not in target:
        raise unknown(what, name, table)
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in table:
            raise
        raise ValueError(f"{what} {name!r}: cannot be imported ({error}); expected 'package.module:Name'") from error


def split_section(section: Section, what: str) -> tuple[str, dict[str, Any]]:
    """(name, keywords) of "dpo" or {"name": "dpo", "beta": 5000}.

    Raises:
        ValueError: neither a name nor a mapping with one.
    """
    if isinstance(section, str):
        return section, {}
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise ValueError(f"{what}: expected a name or a mapping with a 'name', got {section!r}")
    return section["name"], {key: value for key, value in section.items() if key != "name"}


def bind(table: Table, section: Section, *, what: str, **injected: Any) -> tuple[Any, dict[str, Any]]:
    """(row, keywords) of a section, its keywords checked against the row's signature: `build` without the call.

    Args:
        injected: keywords that the program gives, passed on only if the signature asks for them.

    Raises:
        ValueError: unknown name or keyword (with the nearest match), a missing one, or a value of the wrong type.
    """
    name, keywords = split_section(section, what)
    target = resolve(table, name, what)
    parameters = inspect.signature(target).parameters
    accepted = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = [p for p in accepted if p not in injected]
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for key in keywords:
        if key not in own:
            raise unknown(f"key of {what} {name!r}", key, own)
    values = {k: coerce(v, hints.get(k, Any), f"{what}.{k}") for k, v in keywords.items()}
    values |= {key: value for key, value in injected.items() if key in accepted}
    missing = [p for p in accepted if parameters[p].default is inspect.Parameter.empty and p not in values]
    if missing:
        raise ValueError(f"{what} {name!r} needs {', '.join(missing)}")
    return target, values


def build(table: Table, section: Section, *, what: str, **injected: Any) -> Any:
    """Calls the row that a section names with the section's keywords; arguments and errors are those of `bind`."""
    target, values = bind(table, section, what=what, **injected)
    return target(**values)


def coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type: text such as 1e-5 (which YAML 1.1 reads as text) becomes a number.

    Raises:
        ValueError: a value that is not of the annotated type; the message names key, expectation and value.
    """
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    simple = [a for a in allowed if a in (int, float, bool, str, type(None))]
    if len(simple) != len(allowed):
        return value  # a container or a class of its own: the constructor judges it
    if value is None and type(None) in simple:
        return None
    for kind in (bool, int, float, str):
        if kind in simple and (fitting := _fitting(value, kind)) is not None:
            return fitting
    names = " or ".join("nothing" if a is type(None) else a.__name__ for a in simple)
    raise ValueError(f"{key}: expected {names}, got {value!r}")


def _fitting(value: Any, kind: type) -> Any:
    """`value` as `kind`, or None if it does not mean one: a bool is no number, 2.5 is no int, text may be a number."""
    if isinstance(value, bool):
        return value if kind is bool else None
    if kind is int and isinstance(value, int):
        return value  # not by way of float, which would round a large seed
    if kind in (int, float) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            return None
        if kind is float:
            return number
        return int(number) if number.is_integer() else None
    return value if isinstance(value, kind) else None

"""YAML in which nothing is lost without a word, and dotted overrides of what it says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KEY_PART = r'"([^"]+)"|([^."=\s]+)'  # of a dotted key; a part that holds a dot is quoted


class _Strict(yaml.SafeLoader):
    """YAML that refuses a key written twice, which plain YAML silently lets the last one win."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is written twice, at {str(node.start_mark).strip()}")
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ValueError: not readable, not YAML, not a mapping, or a key twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one dotted key in place: method.beta=2000, rewards."hpsv2.1"=5, validation_prompts=[a red circle].

    Raises:
        ValueError: not of the form key=value, or a path through something that is not a section.
    """
    key, equals, text = override.partition("=")
    parts = [quoted or plain for quoted, plain in re.findall(KEY_PART, key)]
    if not equals or not re.fullmatch(rf"({KEY_PART})(\.({KEY_PART}))*", key):
        raise ValueError(f"expected an override of the form key=value, such as method.beta=2000, got {override!r}")
    try:
        value = yaml.load(text, Loader=_Strict)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    section = values
    for part in parts[:-1]:
        inner = section.get(part)
        if isinstance(inner, str):  # `method: dpo` is short for `method: {name: dpo}`
            inner = {"name": inner}
        elif inner is not None and not isinstance(inner, Mapping):
            raise ValueError(f"override {override!r}: {part} is not a section but {inner!r}")
        section[part] = section = dict(inner or {})
    section[parts[-1]] = value

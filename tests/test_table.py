"""Tables: names, sections and their errors."""

from dataclasses import dataclass

import pytest

from diffalign.table import bind, build, coerce, resolve, split_section


@dataclass(frozen=True)
class Cup:
    size: float
    handles: int = 1
    color: str | None = None
    hot: bool = False


TABLE = {"cup": f"{__name__}:Cup", "counter": "collections:Counter", "gone": "diffalign.no_such_module:X"}


def test_build_calls_the_row_with_its_keywords() -> None:
    assert build(TABLE, {"name": "cup", "size": 2, "color": "red"}, what="thing") == Cup(2.0, 1, "red")


def test_text_that_yaml_leaves_as_text_becomes_a_number() -> None:
    assert build(TABLE, {"name": "cup", "size": "1e-5", "handles": "3"}, what="thing") == Cup(1e-5, 3)


def test_a_dotted_path_names_ones_own() -> None:
    assert resolve({}, f"{__name__}:Cup", "thing") is Cup


def test_injected_keywords_reach_only_those_who_ask() -> None:
    assert build(TABLE, {"name": "cup"}, what="thing", size=4.0, device="cpu") == Cup(4.0)


def test_an_injected_keyword_is_not_the_users() -> None:
    with pytest.raises(ValueError, match=r"unknown key of thing 'cup' 'size'"):
        build(TABLE, {"name": "cup", "size": 1}, what="thing", size=4.0)


def test_bind_checks_without_calling() -> None:
    target, keywords = bind(TABLE, {"name": "cup", "size": 1}, what="thing")
    assert target is Cup and keywords == {"size": 1.0}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("cop", r"unknown thing 'cop', did you mean 'cup'\? known are counter, cup, gone"),
        ("xyz", r"unknown thing 'xyz'; known are"),
        ({"size": 1}, r"thing: expected a name or a mapping with a 'name'"),
        ({"name": "cup"}, r"thing 'cup' needs size"),
        ({"name": "cup", "size": 1, "handels": 2}, r"unknown key of thing 'cup' 'handels', did you mean 'handles'\?"),
        ({"name": "cup", "size": "big"}, r"thing.size: expected float, got 'big'"),
        ({"name": "cup", "size": True}, r"thing.size: expected float, got True"),
        ({"name": "cup", "size": 1, "handles": 1.5}, r"thing.handles: expected int, got 1.5"),
        ({"name": "cup", "size": 1, "color": 7}, r"thing.color: expected str or nothing, got 7"),
        ({"name": "cup", "size": 1, "hot": "yes please"}, r"thing.hot: expected bool"),
        ("no.such:Thing", r"cannot be imported"),
        ("collections:Nothing", r"cannot be imported"),
    ],
)
def test_bad_sections_are_named(section: str | dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(TABLE, section, what="thing")


def test_a_row_that_does_not_import_is_a_fault_of_the_table_not_of_the_user() -> None:
    with pytest.raises(ImportError):
        resolve(TABLE, "gone", "thing")


def test_a_bare_name_is_a_section_without_keywords() -> None:
    assert split_section("cup", "thing") == ("cup", {})
    assert split_section({"name": "cup", "size": 1}, "thing") == ("cup", {"size": 1})


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-5", float, 1e-5),
        (3, float, 3.0),
        ("12", int, 12),
        (12.0, int, 12),
        (2**60 + 1, int, 2**60 + 1),  # by way of float it would be 2**60
        (None, float | None, None),
        ("latest", str | None, "latest"),
        ([1], list[int], [1]),
    ],
)
def test_coerce(value: object, hint: object, expected: object) -> None:
    result = coerce(value, hint, "key")
    assert result == expected and type(result) is type(expected)


def test_a_number_that_stands_for_text_stays_an_error() -> None:
    with pytest.raises(ValueError, match=r"key: expected str, got 5"):
        coerce(5, str, "key")

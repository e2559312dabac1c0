from __future__ import annotations

import pytest

from diffalign.prompts import Prompt, read_prompts


def test_lines_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle \n\n  zwei Füchse\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "a.txt") == [Prompt("a red circle"), Prompt("zwei Füchse")]
    rows = '{"prompt": "a red circle", "category": "single"}\n\n{"prompt": "tea", "id": 3}\n'
    (tmp_path / "b.jsonl").write_text(rows)
    assert read_prompts(tmp_path / "b.jsonl") == [Prompt("a red circle", "single"), Prompt("tea")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.txt", b"caf\xe9", "UTF-8"),
        ("a.csv", b"prompt", r"\.txt or \.jsonl"),
        ("a.jsonl", b'{"prompt": "x"}\nhello', "line 2: .*no JSON"),
        ("a.jsonl", b'{"caption": "x"}', "line 1: expected .*caption"),
        ("a.jsonl", b'["x"]', "line 1: expected"),
        ("a.jsonl", b'\n{"prompt": " "}', "line 2: expected"),
        ("a.jsonl", b'{"prompt": "x", "category": 3}', "category that is a string, got 3"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.txt"):
        read_prompts(tmp_path / "absent.txt")

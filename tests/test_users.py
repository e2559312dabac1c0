"""Users of preference data: who has enough pairs, which pairs are shots, what embeddings are made of and kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import toy_pairs
from PIL import Image
from tiny_qwen import qwen25_vl

from diffalign.data.example import Example
from diffalign.data.examples import Examples
from diffalign.data.options import DataOptions, Framing
from diffalign.data.records import MediaSource, PreferenceRecord
from diffalign.data.views import view_of
from diffalign.rewards.user_embeddings import VLMUsers
from diffalign.users import Shot, divide, embed_user, embed_users, load_user, parse_users, save_user


def example(user: str, number: int, label: float = 1.0, source: str = "") -> Example:
    winner, loser = (toy_pairs.png("a red circle", 2 * number + side) for side in (0, 1))
    record = PreferenceRecord("a red circle", (MediaSource(winner), MediaSource(loser)), (1.0, 1.0 - label), source,
                              user=user)  # fmt: skip
    [made] = view_of("user_pairs")(record, DataOptions(tie="half"), Framing(32))
    return made


def examples(counts: dict[str, int], validation: Sequence[Example] = ()) -> Examples:
    train = [example(user, number) for user, count in counts.items() for number in range(count)]
    return Examples(tuple(train), tuple(validation), 0, "drop", ())


def shots(count: int = 3, swapped: bool = False) -> list[Shot]:
    made = []
    for number in range(count):
        light, dark = (Image.new("RGB", (28, 28), (level + number,) * 3) for level in (220, 20))
        made.append(Shot("a red circle", *((dark, light) if swapped else (light, dark))))
    return made


def test_shots_are_taken_out_of_what_is_trained_and_few_pairs_are_dropped_and_counted() -> None:
    given = examples({"a": 6, "b": 5, "c": 4, "d": 1}, [example("a", 50), example("c", 51), example("e", 52)])
    divided = divide(given, 4)
    assert {user: len(own) for user, own in divided.shots.items()} == {"a": 4, "b": 4}
    assert divided.dropped == {"c": 5, "d": 1, "e": 1}
    left = divided.examples.train
    assert [e.record.user for e in left] == ["a", "a", "b"]
    assert [e.record.user for e in divided.examples.validation] == ["a"]
    for user, own in divided.shots.items():
        taken = {e.cache_keys() for e in own}
        assert not taken & {e.cache_keys() for e in left if e.record.user == user}
    assert "3 users with fewer than 5 training pairs dropped, with 7 pairs, such as 'c'" in divided.summary(4)


def test_another_row_of_a_users_shot_is_not_trained_on_either() -> None:
    train = [example("a", number) for number in range(5)]
    again = [example("a", number, source="again") for number in range(5)]
    divided = divide(Examples((*train, *again), (), 0, "drop", ()), 4)
    assert len(divided.examples.train) == 2  # the fifth pair, twice
    pictures = {source.sha256 for e in divided.shots["a"] for source in e.sources}
    assert not pictures & {source.sha256 for e in divided.examples.train for source in e.sources}


def test_shots_follow_from_content_and_ties_are_none() -> None:
    train = [example("a", number, label=0.5 if number < 3 else 1.0) for number in range(8)]
    one, other = (divide(Examples(tuple(rows), (), 0, "half", ()), 4) for rows in (train, train[::-1]))
    assert [e.cache_keys() for e in one.shots["a"]] == [e.cache_keys() for e in other.shots["a"]]
    assert all(e.label == 1 for e in one.shots["a"]) and len(one.examples.train) == 4


def test_nobody_with_enough_pairs_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="no user has 5 training pairs, .* the most are 3; lower users.shots"):
        divide(examples({"a": 3}), 4)


def test_a_row_without_a_user_is_refused() -> None:
    record = PreferenceRecord("a", (MediaSource(b""), MediaSource(b"")), (1.0, 0.0), "row 3")
    with pytest.raises(ValueError, match="does not say who preferred"):
        view_of("user_pairs")(record, DataOptions(), Framing(32))


def test_opposite_tastes_have_opposite_directions_in_the_space_of_a_clip() -> None:
    light, dark = embed_user(shots()), embed_user(shots(swapped=True))
    assert light.shape == dark.shape and light.shape[0] == 3 and light.shape[1] % 3 == 0
    (text, better, way), (text_2, better_2, way_2) = (u.chunk(3, -1) for u in (light, dark))
    for part in (text, better, way):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(3))
    assert torch.equal(text, text_2) and not torch.equal(better, better_2)
    torch.testing.assert_close(way, -way_2)
    torch.testing.assert_close(embed_user(shots(1)), light[:1], rtol=0, atol=1e-5)  # a token is of its shot alone


def test_embeddings_are_kept_and_made_again_only_for_other_shots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided = divide(examples({"a": 5, "b/ä": 5}), 4)
    section = parse_users({"name": "clip"})[1]
    folder = tmp_path / "users"
    first = embed_users(divided.shots, section, folder)
    monkeypatch.setattr("diffalign.users.build", None)  # would fail if it were called
    again = embed_users(divided.shots, section, folder)
    assert all(torch.equal(first[user], again[user]) for user in first)
    assert torch.equal(load_user("b/ä", tmp_path), first["b/ä"])
    monkeypatch.undo()
    swapped = {"a": divided.shots["b/ä"][::-1]}
    assert not torch.equal(embed_users(swapped, section, folder)["a"], first["a"])


def test_a_user_is_found_by_file_or_by_name_and_else_named(tmp_path: Path) -> None:
    tokens = torch.randn(4, 6)
    file = save_user(tmp_path / "users" / "b%2F%C3%A4.safetensors", tokens, {"user": "b/ä"})
    assert torch.equal(load_user(file), tokens) and torch.equal(load_user("b/ä", tmp_path), tokens)
    with pytest.raises(ValueError, match="expected a file, or a user of .*; 1 are there: b/ä"):
        load_user("c", tmp_path)
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        load_user(file)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "clip", "shots": 0}, "users.shots: expected at least 1"),
        ({"name": "clop"}, "did you mean 'clip'"),
        ({"name": "clip", "mode": "x"}, "did you mean 'model'"),
        ({"name": "vlm", "tokens": "many"}, "users.tokens: expected int"),
    ],
)
def test_bad_sections_are_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_users(section)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen25_vl(tmp_path_factory.mktemp("vlm"))


def test_a_vision_language_model_reads_the_shots(vlm: Path) -> None:
    """Random weights in the hub's layout: that it is read, in order, and from the layer asked for; not how well."""
    embed = VLMUsers(weights=vlm, tokens=5, dtype="float32")
    light, dark = embed(shots(2)), embed(shots(2, swapped=True))
    assert light.shape == (5, 32) and light.dtype == torch.float32
    assert torch.equal(light, embed(shots(2)))
    assert (light - dark).abs().max() > 1e-4  # which picture is the preferred one changes what is read
    deeper = VLMUsers(weights=vlm, tokens=5, layer=-1, dtype="float32")(shots(2))
    assert (light - deeper).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"users.layer: expected one of 2 layers"):
        VLMUsers(weights=vlm, layer=7)

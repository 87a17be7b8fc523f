"""What strict JSON lets through, and what it does not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.runs import strict_json
from finetune.runs.folder import write_whole

text = st.text(st.characters(exclude_categories=["Cs"]))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=20)


@settings(deadline=None)
@given(values)
def test_what_is_written_is_read_back(value: object) -> None:
    assert strict_json.parse(strict_json.dump(value)) == value
    assert strict_json.parse(strict_json.dump(value, indent=1).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' stands twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "key 'a' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[Infinity]", "Infinity is no JSON number"),
        ("-Infinity", "-Infinity is no JSON number"),
        ("[1,]", "line 1 column"),
        ("", "line 1 column 1"),
        ("{} {}", "Extra data"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\xfd", "decode"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_strict_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict_json.parse(text)


@pytest.mark.parametrize("text", ["1e999", '{"a": [-1e999]}'])
def test_number_beyond_the_float_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="1e999"):
        strict_json.parse(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_nan_and_infinity_are_never_written(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        strict_json.dump(value)


def test_text_stays_readable() -> None:
    assert strict_json.dump({"name": "Knöterich 花"}) == '{"name": "Knöterich 花"}'


def test_file_name_that_is_no_utf8_can_be_written(tmp_path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    write_whole(tmp_path / "a.json", strict_json.dump({"command": [name]}))
    assert strict_json.parse((tmp_path / "a.json").read_bytes()) == {"command": [name]}

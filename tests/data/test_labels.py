import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.labels import find_label_names, match_label_names, read_label_names
from finetune.errors import DataError
from finetune.runs.records import LabelMap

FLOWERS = {"1": "pink primrose", "10": "globe thistle", "2": "hard-leaved pocket orchid"}


def test_read(data):
    assert read_label_names(data.add("cat_to_name.json", "\ufeff" + json.dumps(FLOWERS))) == FLOWERS


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{not json", ["not JSON", "one JSON object"]),
        ("", ["not JSON"]),
        (b"\xff\xfe\x00", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('{"1": NaN}', ["not JSON", "NaN"]),
        ("[]", ["hold a list"]),
        ('[["1", "a"]]', ["hold a list"]),
        ("null", ["hold a NoneType"]),
        ("{}", ["empty"]),
        ('{"1": "a", "1": "b", "2": "c"}', ["1 faults", "'1' stands 2 times"]),
        ('{"1": 5, "2": null, "3": {"a": "b"}, "4": "d"}', ["3 faults", "'1' has no text", "'2'", "'3'"]),
        ('{"1": " "}', ["'1' has no text"]),
    ],
)
def test_faults(content, parts, data):
    with pytest.raises(DataError) as caught:
        read_label_names(data.add("names.json", content))
    for part in (*parts, "names.json"):
        assert part in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_label_names(tmp_path / "absent.json")


@given(st.dictionaries(st.text(), st.text().filter(str.strip), min_size=1))
def test_any_names_are_read_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("names") / "names.json"
    path.write_text(json.dumps(names))
    assert read_label_names(path) == names


def test_found_in_the_data_or_beside_it(data):
    assert find_label_names(data.path) is None
    beside = data.path.parent / "cat_to_name.json"
    beside.write_text("{}")
    table = data.add("table.csv", "image_path,label\n")
    assert find_label_names(data.path) == beside
    assert find_label_names(table) is None
    inside = data.add("cat_to_name.json", "{}")
    assert find_label_names(data.path) == find_label_names(table) == inside


def test_names_follow_the_folder_not_the_position():
    classes = ["2", "10", "1"]
    match = match_label_names(classes, FLOWERS, source="names.json")
    assert (match.unnamed_classes, match.unused_entries) == ((), ())
    labels = LabelMap.from_names(classes, FLOWERS)
    assert labels.class_names == ("1", "10", "2")
    assert labels.display_names == ("pink primrose", "globe thistle", "hard-leaved pocket orchid")


def test_partial_match():
    match = match_label_names(["1", "rose"], FLOWERS, source="names.json")
    assert (match.unnamed_classes, match.unused_entries) == (("rose",), ("10", "2"))


def test_no_match_lists_both_sides():
    with pytest.raises(DataError) as caught:
        match_label_names(["rose", "tulip"], FLOWERS, source="names.json")
    for part in ("'rose', 'tulip'", "'1', '10', '2'", "names.json", "--label-names"):
        assert part in str(caught.value)

"""The table by columns gives back the rows that went in, whole and in parts."""

import json
import pickle
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.table import SPLITS, ImageRow, ImageTable, Rows, Texts, sort_by_path
from finetune.runs.records import LabelMap

ROOT = Path("/data")
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=9)
HASHES = st.binary(min_size=32, max_size=32).filter(any)
ROWS = st.lists(
    st.builds(
        ImageRow,
        image_path=NAMES,
        label=NAMES,
        split=st.sampled_from([*SPLITS, None]),
        group=st.none() | NAMES,
        sha256=st.just("") | HASHES.map(bytes.hex),
        perceptual_hash=st.none() | HASHES.map(lambda data: int.from_bytes(data, "big")),
        width_px=st.integers(0, 2**31 - 1),
        height_px=st.integers(0, 2**31 - 1),
    )
)


@given(rows=ROWS)
def test_rows_come_back_as_they_went_in(rows: list[ImageRow]) -> None:
    kept = Rows(rows)
    assert list(kept) == rows
    assert list(pickle.loads(pickle.dumps(kept))) == rows
    assert list(kept[::2]) == rows[::2]
    assert list(kept[1:].take(np.arange(len(rows) - 1)[::-1])) == rows[:0:-1] if rows else not len(kept)
    for split in (*SPLITS, None):
        assert list(ImageTable(ROOT, kept).select(split).rows) == [row for row in rows if row.split == split]
    assert [row.image_path for row in sort_by_path(kept)] == sorted(row.image_path for row in rows)


@given(rows=ROWS)
def test_fingerprint_is_over_all_that_is_learned_from_in_the_order_of_paths(rows: list[ImageRow]) -> None:
    rows = list({row.image_path: row for row in rows}.values())
    facts = sorted((row.image_path, row.label, row.split or "", row.sha256) for row in rows)
    assert ImageTable(ROOT, rows).fingerprint() == sha256(json.dumps(facts).encode("ascii")).hexdigest()
    assert ImageTable(ROOT, rows[::-1]).fingerprint() == ImageTable(ROOT, rows).fingerprint()


def test_columns_are_shared_by_the_parts_of_a_table() -> None:
    rows = Rows(ImageRow(image_path=f"{n}", label="ab"[n % 2], split="train" if n % 3 else "valid") for n in range(9))
    part = ImageTable(ROOT, rows).select("train").rows
    assert part.paths is rows.paths
    assert part.pictures is rows.pictures
    moved = part.with_splits(np.full(len(part), SPLITS.index("test"), np.int8))
    assert {row.split for row in moved} == {"test"}
    assert {row.split for row in rows} == {"train", "valid"}
    seen = part.own_pictures()
    seen.size_px[:] = (3, 4)
    assert {(row.width_px, row.height_px) for row in part.with_pictures(seen)} == {(3, 4)}
    assert {row.width_px for row in part} == {0}
    backwards = rows.take(np.arange(len(rows))[::-1])
    seen = backwards.own_pictures()
    seen.size_px[:, 0] = np.arange(len(rows))
    assert [row.width_px for row in backwards.with_pictures(seen)] == list(range(len(rows)))


def test_class_indices_follow_the_label_map_whatever_the_order_of_labels() -> None:
    rows = [ImageRow(image_path=label, label=label) for label in ("b", "10", "2", "b")]
    table = ImageTable(ROOT, rows)
    assert table.class_names == ("10", "2", "b")
    label_map = LabelMap.from_names(["10", "2", "a", "b"], {})
    assert table.class_indices(label_map).tolist() == [3, 0, 1, 3]
    assert ImageTable(ROOT, table.rows[1:3]).class_names == ("10", "2")


def test_a_name_that_is_no_utf8_keeps_its_bytes() -> None:
    name = b"\xff\xfe.jpg".decode(errors="surrogateescape")
    assert Rows([ImageRow(image_path=name, label="a")])[0].image_path == name


def test_places_outside_are_refused() -> None:
    texts = Texts(["a", "", "bc"])
    assert list(texts) == ["a", "", "bc"]
    assert texts[1:] == ["", "bc"]
    for place in (-1, 3):
        with pytest.raises(IndexError):
            texts[place]
    with pytest.raises(IndexError):
        Rows()[0]


def test_equal_rows_are_equal_tables() -> None:
    rows = [ImageRow(image_path="1", label="a"), ImageRow(image_path="2", label="b")]
    assert ImageTable(ROOT, rows) == ImageTable(ROOT, tuple(rows))
    assert ImageTable(ROOT, rows) != ImageTable(ROOT, rows[:1])
    assert ImageTable(ROOT, rows) != ImageTable(ROOT, [rows[0], replace(rows[1], split="test")])

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.listing import list_images
from finetune.data.scan import scan_images
from finetune.data.split import apply_split, read_split_csv, split_table, write_split_csv
from finetune.data.table import ImageRow, ImageTable
from finetune.errors import ConfigError, DataError, RunError

ROOT = Path("/data")


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def table_of(*rows):
    return ImageTable(ROOT, tuple(rows))


def singles(label, count, **fields):
    return [
        ImageRow(image_path=f"{label}/{n}.png", label=label, sha256=digest(f"{label}{n}"), **fields)
        for n in range(count)
    ]


def sides(table):
    """Return the images of each (label, split)."""
    return Counter((row.label, row.split) for row in table.rows)


def test_each_class_gives_its_share():
    table = split_table(table_of(*singles("a", 50), *singles("b", 10), *singles("c", 2)), seed=1)
    assert sides(table) == {
        ("a", "train"): 40,
        ("a", "valid"): 10,
        ("b", "train"): 8,
        ("b", "valid"): 2,
        ("c", "train"): 1,
        ("c", "valid"): 1,
    }
    assert list(table.rows) == sorted(table.rows, key=lambda row: row.image_path)


def test_seed_decides_and_order_does_not():
    rows = [*singles("a", 40), *singles("b", 40)]
    first = split_table(table_of(*rows), seed=1)
    assert split_table(table_of(*rows[::-1]), seed=1) == first
    assert split_table(table_of(*rows), seed=2) != first


def test_train_and_valid_given_are_kept():
    table = table_of(*singles("a", 3, split="train"), *singles("b", 3, split="valid"), *singles("c", 1, split="test"))
    assert split_table(table, seed=0) == table


def test_validation_is_carved_from_train_and_test_is_untouched():
    test = [ImageRow(image_path=f"test/{n}.png", label="a", split="test", sha256=digest(f"a{n}")) for n in range(5)]
    table = split_table(table_of(*singles("a", 10, split="train"), *test), seed=0)
    assert sides(table) == {("a", "train"): 8, ("a", "valid"): 2, ("a", "test"): 5}
    assert all(row.split == "test" for row in table.rows if row.image_path.startswith("test/"))


def test_partly_filled_split_column():
    with pytest.raises(DataError, match="2 of 5 images have no split") as caught:
        split_table(table_of(*singles("a", 2), *singles("b", 3, split="train")), seed=0)
    assert "'a/0.png', 'a/1.png'" in caught.value.message


@pytest.mark.parametrize("rows", [[], singles("a", 3, split="test"), singles("a", 3, split="valid")])
def test_no_training_images(rows):
    with pytest.raises(DataError, match="no training images"):
        split_table(table_of(*rows), seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError, match="valid_fraction"):
        split_table(table_of(*singles("a", 9)), seed=0, valid_fraction=fraction)


@pytest.mark.parametrize("tie", [{"group": "g"}, {"sha256": digest("same")}, {"perceptual_hash": 7}])
def test_class_that_cannot_be_on_both_sides(tie):
    tied = [replace(row, **tie) for row in singles("b", 4)]
    with pytest.raises(DataError) as caught:
        split_table(table_of(*singles("a", 9), *tied, *singles("c", 1)), seed=0)
    assert "2 classes cannot be on both sides" in caught.value.message
    assert "'b' (4 images), 'c' (1 images)" in caught.value.message


def test_ties_hold_through_others():
    """1 and 2 are of one group, 2 and 3 of identical bytes, 3 and 4 show one picture."""
    chain = [
        ImageRow(image_path="1", label="a", group="g", sha256=digest("1")),
        ImageRow(image_path="2", label="a", group="g", sha256=digest("same")),
        ImageRow(image_path="3", label="b", sha256=digest("same"), perceptual_hash=5),
        ImageRow(image_path="4", label="b", sha256=digest("4"), perceptual_hash=5),
    ]
    for seed in range(20):
        table = split_table(table_of(*chain, *singles("a", 4), *singles("b", 4)), seed=seed, valid_fraction=0.5)
        assert len({row.split for row in table.rows if len(row.image_path) == 1}) == 1


def test_flat_pictures_and_unscanned_rows_are_not_tied():
    rows = [ImageRow(image_path=f"{n}", label="a") for n in range(10)]
    assert sides(split_table(table_of(*rows), seed=0)) == {("a", "train"): 8, ("a", "valid"): 2}


def test_large_group_stays_in_train_where_small_ones_fill_the_share():
    rows = [replace(row, group="film" if index < 6 else None) for index, row in enumerate(singles("a", 10))]
    for seed in range(20):
        table = split_table(table_of(*rows), seed=seed)
        assert sides(table) == {("a", "train"): 8, ("a", "valid"): 2}


def test_only_the_larger_parts_can_be_held_back():
    rows = [replace(row, group=f"film{index % 2}") for index, row in enumerate(singles("a", 10))]
    assert sides(split_table(table_of(*rows), seed=0)) == {("a", "train"): 5, ("a", "valid"): 5}


def test_groups_that_span_classes_in_a_ring():
    """Four groups, each shared by two neighbouring classes: only one way to divide them, and its mirror image."""
    rows = [
        ImageRow(image_path=f"{group}{label}", label=label, group=group, sha256=digest(f"{group}{label}"))
        for group, labels in {"g1": "ab", "g2": "bc", "g3": "cd", "g4": "da"}.items()
        for label in labels
    ]
    for seed in range(20):
        assert set(sides(split_table(table_of(*rows), seed=seed)).values()) == {1}


def test_groups_that_leave_no_way():
    rows = [
        ImageRow(image_path=f"{group}{label}", label=label, group=group, sha256=digest(f"{group}{label}"))
        for group, labels in {"g1": "ab", "g2": "bc", "g3": "ca"}.items()
        for label in labels
    ]
    with pytest.raises(DataError, match="groups and copies tie classes together"):
        split_table(table_of(*rows), seed=0)


ROWS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.one_of(st.none(), st.integers(0, 8)),
        st.integers(0, 60),
        st.one_of(st.none(), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(values=ROWS, seed=st.integers(0, 2**31), fraction=st.sampled_from([0.1, 0.2, 0.5]), order=st.randoms())
def test_split_holds_its_promises(values, seed, fraction, order):
    rows = [
        ImageRow(
            image_path=f"{index}.png",
            label=label,
            group=None if group is None else f"g{group}",
            sha256=digest(f"h{sha}"),
            perceptual_hash=picture,
        )
        for index, (label, group, sha, picture) in enumerate(values)
    ]
    try:
        table = split_table(table_of(*rows), seed=seed, valid_fraction=fraction)
    except DataError as error:
        assert "cannot be on both sides" in error.message or "tie classes together" in error.message  # noqa: PT017
        return
    for tie in ("group", "sha256", "perceptual_hash"):
        splits = defaultdict(set)
        for row in table.rows:
            splits[getattr(row, tie)].add(row.split)
        assert all(len(found) == 1 for value, found in splits.items() if value is not None)
    found = sides(table)
    for label in table.class_names:
        assert found[label, "train"] >= 1
        assert found[label, "valid"] >= 1
    order.shuffle(rows)
    assert split_table(table_of(*rows), seed=seed, valid_fraction=fraction) == table
    assert sorted(replace(row, split=None).image_path for row in table.rows) == sorted(row.image_path for row in rows)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, 9), min_size=2, max_size=8), min_size=1),
    seed=st.integers(0, 1000),
)
def test_classes_with_two_parts_are_always_on_both_sides(sizes, seed):
    rows = [
        ImageRow(
            image_path=f"{label}/{part}/{n}", label=label, group=f"{label}{part}", sha256=digest(f"{label}/{part}/{n}")
        )
        for label, parts in sizes.items()
        for part, size in enumerate(parts)
        for n in range(size)
    ]
    found = sides(split_table(table_of(*rows), seed=seed))
    assert all(found[label, "train"] and found[label, "valid"] for label in sizes)


@given(counts=st.dictionaries(st.text(max_size=3), st.integers(2, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_share_is_exact_where_nothing_is_tied(counts, seed):
    found = sides(split_table(table_of(*(row for label, n in counts.items() for row in singles(label, n))), seed=seed))
    assert all(found[label, "valid"] == max(1, round(0.2 * count)) for label, count in counts.items())


# split.csv

STRANGE = [
    "new\nline",
    "carriage\rreturn",
    'quo"te',
    "🌷",
    "-dash",
    "<script>",
    "=cmd",
    "../x",
    " spaces ",
    "a,b",
    "\udce9",
]


def test_written_split_is_read_back(tmp_path):
    rows = [
        ImageRow(
            image_path=f"{text}.png", label=text, split="valid" if n % 2 else "train", group=text if n % 3 else None
        )
        for n, text in enumerate(STRANGE)
    ]
    write_split_csv(table_of(*rows), tmp_path / "split.csv")
    entries = read_split_csv(tmp_path / "split.csv")
    assert list(entries) == sorted(rows, key=lambda row: row.image_path)
    bare = table_of(*(replace(row, split=None, group=None) for row in rows))
    assert list(apply_split(bare, tmp_path / "split.csv").rows) == sorted(rows, key=lambda row: row.image_path)
    assert (tmp_path / "split.csv").read_bytes().startswith(b'"image_path","label","split","group","sha256"\n')


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(entries=st.dictionaries(TEXTS, st.tuples(TEXTS, st.sampled_from(["train", "valid", "test", None]), TEXTS)))
def test_any_names_survive_the_round_trip(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("split") / "split.csv"
    rows = [
        ImageRow(image_path=name, label=value[0], split=value[1], group=value[2]) for name, value in entries.items()
    ]
    write_split_csv(table_of(*rows), path)
    assert list(read_split_csv(path)) == sorted(rows, key=lambda row: row.image_path)


def test_real_names_survive_from_the_folder_to_the_file_and_back(data, tmp_path):
    for n, text in enumerate(["new\nline", 'quo"te', "🌷", "-dash", "<script>", "=cmd", " spaces "]):
        data.images(f"{text}/{text}.png", f"{text}/2.png", first_seed=10 * n)
    table = split_table(scan_images(list_images(data.path)).table, seed=0)
    write_split_csv(table, tmp_path / "split.csv")
    assert apply_split(scan_images(list_images(data.path)).table, tmp_path / "split.csv") == table


def test_changed_images_are_listed(tmp_path):
    rows = [replace(row, sha256=f"{n:064x}") for n, row in enumerate(singles("a", 4, split="train"))]
    write_split_csv(table_of(*rows), tmp_path / "split.csv")
    changed = table_of(
        rows[0],
        replace(rows[1], label="b"),
        replace(rows[3], sha256="f" * 64),
        ImageRow(image_path="new.png", label="a"),
    )
    with pytest.raises(DataError) as caught:
        apply_split(changed, tmp_path / "split.csv")
    for part in ("1 new: 'new.png'", "1 gone: 'a/2.png'", "1 of another label: 'a/1.png'", "1 changed: 'a/3.png'"):
        assert part in caught.value.message


def test_a_split_without_hashes_does(tmp_path):
    (tmp_path / "split.csv").write_text("image_path,label,split,group\na/0.png,a,train,\n")
    row = ImageRow(image_path="a/0.png", label="a", sha256="f" * 64)
    assert list(apply_split(table_of(row), tmp_path / "split.csv").rows) == [replace(row, split="train")]


def test_absent_split_file(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        apply_split(table_of(), tmp_path / "split.csv")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("image_path,label,split\n", "lacks the column group"),
        ("image_path,label,split,group\na,b,Train,\n", "row 2: unknown split 'Train'"),
        ("", "lacks the column"),
        ("image_path,label,split,group,sha256\na,b,train,,f00\n", "row 2: 'f00' is no SHA-256"),
    ],
)
def test_damaged_split_file(text, part, tmp_path):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(DataError, match=part):
        read_split_csv(tmp_path / "split.csv")

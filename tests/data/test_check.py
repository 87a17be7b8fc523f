import json

import pytest

from finetune.data.check import examine, require_trainable
from finetune.data.listing import list_images
from finetune.data.scan import scan_images
from finetune.errors import DataError


@pytest.fixture
def diagnose(data):
    return lambda *names, **options: examine(scan_images(list_images(data.path)), *names, **options)


def codes(diagnosis):
    return {(finding.severity, finding.code) for finding in diagnosis.findings}


def found(diagnosis, code):
    (finding,) = [finding for finding in diagnosis.findings if finding.code == code]
    return finding


def fill(data, split="", *, seed=0, **counts):
    """Add `counts` images of each class."""
    for label, count in counts.items():
        for number in range(count):
            data.image(f"{split}/{label}/{number}.png".lstrip("/"), seed)
            seed += 1


def test_sound_data(data, diagnose):
    fill(data, "train", a=6, b=5, seed=0)
    fill(data, "valid", a=2, b=1, seed=100)
    diagnosis = diagnose()
    assert diagnosis.findings == ()
    assert (diagnosis.image_count, diagnosis.class_count) == (14, 2)
    assert diagnosis.images_per_split == {"train": 11, "valid": 3}
    assert diagnosis.images_per_class == (5, 5.5, 6)
    require_trainable(diagnosis)


def test_bad_files_by_reason(data, diagnose):
    fill(data, a=5, b=5)
    data.add("a/empty.png", "")
    data.add("a/text.png", "text")
    data.add("b/text.png", "text")
    diagnosis = diagnose()
    warnings = {f.message.split(":")[0]: f.examples for f in diagnosis.findings if f.code == "bad_files"}
    assert warnings == {
        "1 files that cannot be read (empty)": ("a/empty.png",),
        "2 files that cannot be read (not_an_image)": ("a/text.png", "b/text.png"),
    }
    assert ("error", "too_many_bad_files") in codes(diagnosis)
    assert diagnosis.findings[0].severity == "error", "errors come first"
    assert codes(diagnose(allow_bad_images=True)) == {("warning", "bad_files")}


def test_empty_class(data, diagnose):
    fill(data, "train", a=5, b=5)
    fill(data, "valid", a=1, b=1, seed=50)
    data.folder("valid/c")
    assert codes(diagnose()) == {("warning", "empty_class")}
    data.folder("train/c")
    diagnosis = diagnose()
    assert {("error", "empty_class"), ("warning", "empty_class")} <= codes(diagnosis)
    assert diagnosis.findings[0].examples == ("train/c",)


def test_empty_class_without_splits(data, diagnose):
    fill(data, a=5, b=5)
    data.folder("c")
    assert found(diagnose(), "empty_class").examples == ("c",)
    assert ("error", "empty_class") in codes(diagnose())


def test_one_class(data, diagnose):
    fill(data, a=5)
    finding = found(diagnose(), "too_few_classes")
    assert finding.severity == "error"
    assert "'a'" in finding.message


def test_no_image_that_decodes(data, diagnose):
    data.add("a/1.png", "text")
    diagnosis = diagnose({"a": "A"}, "names.json", allow_bad_images=True)
    assert diagnosis.images_per_class == (0, 0, 0)
    assert {("error", "too_few_classes"), ("error", "cannot_split")} <= codes(diagnosis)


def test_one_image_in_a_class_with_a_split_asked(data, diagnose):
    fill(data, a=5, b=1)
    finding = found(diagnose(), "cannot_split")
    assert finding.severity == "error"
    assert "'b' (1 images)" in finding.message


def test_one_image_in_a_class_with_a_split_given(data, diagnose):
    fill(data, "train", a=5, b=1)
    fill(data, "valid", a=1, b=1, seed=50)
    assert codes(diagnose()) == {("warning", "few_images")}


def test_differing_classes_in_train_and_valid(data, diagnose):
    fill(data, "train", a=5, b=5, c=5)
    fill(data, "valid", a=1, d=1, seed=50)
    fill(data, "test", e=1, seed=60)
    diagnosis = diagnose()
    strange, unseen = found(diagnosis, "class_not_in_train"), found(diagnosis, "class_not_in_valid")
    assert (strange.severity, strange.examples) == ("error", ("d", "e"))
    assert (unseen.severity, unseen.examples) == ("warning", ("b", "c"))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_identical_bytes_in_train_and_held_out(split, data, diagnose):
    fill(data, "train", a=5, b=5)
    fill(data, "valid", a=1, b=1, seed=50)
    data.image(f"{split}/a/copy.png", 0)
    diagnosis = diagnose()
    assert codes(diagnosis) == {("warning", "leak")}
    assert set(found(diagnosis, "leak").examples[0].split(" = ")) == {f"{split}/a/copy.png", "train/a/0.png"}


def test_identical_bytes_under_two_labels(data, diagnose):
    fill(data, a=5, b=5)
    data.image("b/copy.png", 0)
    diagnosis = diagnose()
    assert codes(diagnosis) == {("warning", "two_labels")}
    assert found(diagnosis, "two_labels").examples == ("a/0.png = b/copy.png",)


def test_near_duplicates_across_splits(data, diagnose):
    fill(data, "train", a=5, b=5)
    fill(data, "valid", a=1, b=1, seed=50)
    data.image("valid/a/other_format.bmp", 0)
    diagnosis = diagnose()
    assert codes(diagnosis) == {("warning", "near_leak")}
    assert found(diagnosis, "near_leak").examples == ("train/a/0.png = valid/a/other_format.bmp",)


def test_classes_that_differ_by_case_only(data, diagnose):
    fill(data, Rose=5, rose=5, tulip=5)
    finding = found(diagnose(), "classes_differ_by_case")
    assert (finding.severity, finding.examples) == ("warning", ("Rose", "rose"))


def test_few_images_and_imbalance(data, diagnose):
    fill(data, a=45, b=4)
    diagnosis = diagnose()
    assert codes(diagnosis) == {("warning", "few_images"), ("warning", "imbalance")}
    assert found(diagnosis, "few_images").examples == ("b",)
    assert found(diagnosis, "imbalance").message == "class 'a' has 45 images and class 'b' only 4"


def test_ratio_of_ten_is_no_imbalance(data, diagnose):
    fill(data, a=50, b=5)
    assert codes(diagnose()) == set()


def test_label_names(data, diagnose):
    fill(data, a=5, b=5)
    assert codes(diagnose({"a": "A", "b": "B"}, "names.json")) == set()
    diagnosis = diagnose({"a": "A", "z": "Z"}, "names.json")
    assert codes(diagnosis) == {("warning", "unnamed_classes"), ("note", "unused_label_names")}
    assert found(diagnosis, "unnamed_classes").examples == ("b",)
    assert found(diagnosis, "unused_label_names").examples == ("z",)
    mismatch = found(diagnose({"x": "X"}, "names.json"), "label_names_mismatch")
    assert mismatch.severity == "error"
    assert "names.json" in mismatch.message


def test_ignored_files_and_folders_not_entered(data, diagnose):
    fill(data, "train", a=5, b=5)
    fill(data, "valid", a=1, b=1, seed=50)
    data.add("train/a/notes.txt", "notes")
    data.image("more/1.png", 99)
    diagnosis = diagnose()
    assert codes(diagnosis) == {("warning", "not_entered"), ("note", "ignored_files")}
    assert found(diagnosis, "ignored_files").examples == ("train/a/notes.txt",)


def test_partly_filled_split_column(data):
    data.images("1.png", "2.png", "3.png", "4.png")
    table = data.add("t.csv", "image_path,label,split\n1.png,a,train\n2.png,b,train\n3.png,a,\n4.png,b,\n")
    diagnosis = examine(scan_images(list_images(table)))
    assert "2 of 4 images have no split" in found(diagnosis, "cannot_split").message


def test_require_trainable_tells_all_errors(data, diagnose):
    fill(data, a=5, b=1)
    data.folder("c")
    with pytest.raises(DataError) as caught:
        require_trainable(diagnose())
    assert "'c'" in caught.value.message
    assert "'b' (1 images)" in caught.value.message
    assert "finetune check" in caught.value.hint


def test_to_json(data, diagnose):
    fill(data, a=6, b=1)
    document = json.loads(json.dumps(diagnose().to_json(), allow_nan=False))
    assert document["image_count"] == 7
    assert document["images_per_split"] == {"unsplit": 7}
    assert document["images_per_class"] == {"min": 1, "median": 3.5, "max": 6}
    assert document["findings"][0]["severity"] == "error"
    assert set(document["findings"][0]) == {"severity", "code", "message", "examples"}

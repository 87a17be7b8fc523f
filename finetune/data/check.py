"""The doctor: everything that is odd about a data set, told before a model learns it."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from finetune.data.copies import find_copies
from finetune.data.labels import match_label_names
from finetune.data.listing import Listing
from finetune.data.scan import Scan, require_few_bad
from finetune.data.split import split_table
from finetune.data.table import SPLITS, ImageRow, ImageTable, Rows, Split
from finetune.errors import DataError, first_ten

Severity = Literal["error", "warning", "note"]

FEW_IMAGES = 5
"""Below this many training images a class gets a warning."""

MAX_IMBALANCE = 10
"""Above this ratio of the largest class to the smallest there is a warning: accuracy then rewards guessing."""


CHECK_HINT = "`finetune check DATA` lists every finding with examples"


@dataclass(frozen=True)
class Finding:
    """One thing found: an `error` stops training, a `warning` bends its results, a `note` is good to know.

    `code` is stable, for programs; `examples` are the paths or class names concerned.
    """

    severity: Severity
    code: str
    message: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The counts and findings of a data set, errors first.

    `images_per_split` counts the good images by split, those without one under "unsplit". `images_per_class` is
    (minimum, median, maximum) over the classes of the training or unsplit images.
    """

    image_count: int
    class_count: int
    images_per_split: Mapping[str, int]
    images_per_class: tuple[int, float, int]
    findings: tuple[Finding, ...]

    def of_severity(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and text."""
        low, middle, high = self.images_per_class
        findings = [{**asdict(finding), "examples": list(finding.examples)} for finding in self.findings]
        return {
            "image_count": self.image_count,
            "class_count": self.class_count,
            "images_per_split": dict(self.images_per_split),
            "images_per_class": {"min": low, "median": middle, "max": high},
            "findings": findings,
        }


def examine(
    scan: Scan,
    label_names: Mapping[str, str] | None = None,
    label_source: str | Path = "",
    *,
    allow_bad_images: bool = False,
) -> Diagnosis:
    """Look a scanned data set over for what makes training fail or its scores lie.

    Args:
        scan: the data set.
        label_names: the shown name by class name, if there are any.
        label_source: where they come from, for messages.
        allow_bad_images: whether more unreadable images than the rule allows are no error.
    """
    rows = scan.table.rows
    learned = ImageTable(scan.table.root, rows.take(np.isin(rows.split_codes, [-1, SPLITS.index("train")])))
    findings = [
        *_file_findings(scan, allow_bad_images),
        *_class_findings(scan, learned),
        *_split_findings(scan.table),
        *_copy_findings(rows),
        *_label_findings(scan.table.class_names, label_names, label_source),
    ]
    order: tuple[Severity, ...] = ("error", "warning", "note")
    counts = sorted(Counter(learned.labels).values()) or [0]
    names = (*SPLITS, "unsplit")  # as the last of which -1 counts
    per_split = Counter(names[code] for code in rows.split_codes.tolist())
    return Diagnosis(
        image_count=len(scan.table),
        class_count=len(scan.table.class_names),
        images_per_split={name: per_split[name] for name in names if per_split[name]},
        images_per_class=(counts[0], median(counts), counts[-1]),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
    )


def require_classes(listing: Listing) -> None:
    """Refuse a listing of fewer than two classes, before any image is read.

    Raises:
        DataError: naming what there is.
    """
    if len(listing.class_names) < 2:
        raise DataError(_too_few_classes(listing.class_names), hint=CHECK_HINT)


def require_trainable(diagnosis: Diagnosis) -> None:
    """Refuse a data set with errors.

    Raises:
        DataError: listing all of them.
    """
    if errors := diagnosis.of_severity("error"):
        raise DataError(
            f"the data cannot be trained on: {'; '.join(error.message for error in errors)}",
            hint=CHECK_HINT,
        )


def _file_findings(scan: Scan, allow_bad_images: bool) -> Iterator[Finding]:
    try:
        require_few_bad(scan, allow_bad_images=allow_bad_images)
    except DataError as error:
        yield Finding("error", "too_many_bad_files", error.message, tuple(bad.path for bad in scan.bad_files))
    by_reason = defaultdict(list)
    for bad in scan.bad_files:
        by_reason[bad.reason].append(bad.path)
    for reason, paths in sorted(by_reason.items()):
        yield _finding("warning", "bad_files", f"files that cannot be read ({reason})", paths)
    for problem in scan.listing.problems:
        yield Finding("warning", "not_entered", problem)
    ignored = [path.relative_to(scan.listing.root).as_posix() for path in scan.listing.ignored_files]
    if ignored:
        yield _finding("note", "ignored_files", "files passed over as no images of a class", ignored)


def _class_findings(scan: Scan, learned: ImageTable) -> Iterator[Finding]:
    counts = Counter(learned.labels)
    severities: dict[Severity, tuple[Split | None, ...]] = {"error": ("train", None), "warning": ("valid", "test")}
    for severity, splits in severities.items():
        empty = [f"{split or ''}/{name}".lstrip("/") for split, name in scan.listing.empty_classes if split in splits]
        if empty:
            yield _finding(severity, "empty_class", "class folders without an image", empty)
    readable = set(scan.table.class_names)
    if lost := sorted(set(scan.listing.class_names) - readable):
        yield _finding("error", "unreadable_class", "classes of which no image can be read", lost)
    if len(counts) < 2:
        yield Finding("error", "too_few_classes", _too_few_classes(counts))
        return
    if few := [name for name in learned.class_names if counts[name] < FEW_IMAGES]:
        yield _finding("warning", "few_images", f"classes with fewer than {FEW_IMAGES} training images", few)
    largest, smallest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    if counts[largest] > MAX_IMBALANCE * counts[smallest]:
        message = f"class {largest!r} has {counts[largest]} images and class {smallest!r} only {counts[smallest]}"
        yield Finding("warning", "imbalance", message, (largest, smallest))
    by_case = defaultdict(list)
    for name in scan.table.class_names:
        by_case[name.casefold()].append(name)
    if alike := [name for names in by_case.values() if len(names) > 1 for name in names]:
        yield _finding("warning", "classes_differ_by_case", "class names that differ by case only", alike)


def _too_few_classes(class_names: Iterable[str]) -> str:
    return f"there must be at least two classes to learn, found: {first_ten(map(repr, class_names)) or 'none'}"


def _split_findings(table: ImageTable) -> Iterator[Finding]:
    try:
        split_table(table, seed=0)  # the seed decides which images are held back, not whether they can be
    except DataError as error:
        yield Finding("error", "cannot_split", error.message)
    classes = {split: set(table.select(split).class_names) for split in SPLITS}
    if not classes["train"]:
        return
    if strange := sorted((classes["valid"] | classes["test"]) - classes["train"]):
        yield _finding("error", "class_not_in_train", "classes in valid or test that are not in train", strange)
    if classes["valid"] and (unseen := sorted(classes["train"] - classes["valid"])):
        yield _finding("warning", "class_not_in_valid", "classes in train that are not in valid", unseen)


def _copy_findings(rows: Rows) -> Iterator[Finding]:
    pictures = rows.own_pictures()
    by_bytes = _copies(rows, pictures.sha256)
    by_picture = [copies for copies in _copies(rows, pictures.perceptual) if len({row.sha256 for row in copies}) > 1]
    for code, what, copies in (
        ("leak", "the same file in more than one split: scores on it are too good", _across_splits(by_bytes)),
        ("near_leak", "almost the same picture in more than one split", _across_splits(by_picture)),
        (
            "two_labels",
            "the same file under more than one label",
            [c for c in by_bytes if len({r.label for r in c}) > 1],
        ),
    ):
        if copies:
            examples = [" = ".join(row.image_path for row in together) for together in copies]
            yield _finding("warning", code, what, examples)


def _copies(rows: Rows, hashes: np.ndarray[Any, Any]) -> list[list[ImageRow]]:
    """Return the rows that share a hash (32 bytes, not all zero), in sets of two and more, in their order."""
    together = defaultdict(list)
    for place, number in zip(*(each.tolist() for each in find_copies(hashes)), strict=True):
        together[number].append(rows[place])
    return list(together.values())


def _across_splits(copies: Iterable[list[ImageRow]]) -> list[list[ImageRow]]:
    return [together for together in copies if len({row.split for row in together}) > 1]


def _label_findings(
    class_names: Iterable[str], label_names: Mapping[str, str] | None, source: str | Path
) -> Iterator[Finding]:
    if label_names is None:
        return
    try:
        match = match_label_names(class_names, label_names, source=source)
    except DataError as error:
        yield Finding("error", "label_names_mismatch", error.message)
        return
    if match.unnamed_classes:
        message = f"classes without an entry in {source}, shown by their own name"
        yield _finding("warning", "unnamed_classes", message, match.unnamed_classes)
    if match.unused_entries:
        yield _finding("note", "unused_label_names", f"entries of {source} without a class", match.unused_entries)


def _finding(severity: Severity, code: str, what: str, examples: Iterable[str]) -> Finding:
    """Return a finding whose message counts its examples and shows the first ten."""
    examples = tuple(examples)
    return Finding(severity, code, f"{len(examples)} {what}: {first_ten(map(repr, examples))}", examples)

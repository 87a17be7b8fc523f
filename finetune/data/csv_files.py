"""CSV as this room reads and writes it: any file name and any label comes back as it went out."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from finetune.errors import DataError, StorageError, first_ten

# File names need not be valid UTF-8; this error handler carries their bytes through unchanged.
_FOREIGN_BYTES = "surrogateescape"


def read_csv(path: Path, *, required: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, values by column) for each row of a CSV file with a header; a value left out is empty.

    Args:
        path: a comma-separated file in UTF-8, with or without a byte order mark.
        required: the columns that must be there.

    Raises:
        DataError: if the file cannot be read or parsed, lacks a column, or has a row longer than its header.
    """
    try:
        with path.open(encoding="utf-8-sig", errors=_FOREIGN_BYTES, newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            if missing := [name for name in required if name not in columns]:
                raise DataError(
                    f"{path} lacks the column {' and '.join(missing)}; its columns are: {first_ten(columns) or 'none'}",
                    hint="the first line names the columns, separated by commas",
                )
            too_long = []
            for row in reader:
                if None in row:
                    too_long.append(f"row {reader.line_num}")
                else:
                    yield reader.line_num, row
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if too_long:
        raise DataError(f"{path} has more values than columns: {first_ten(too_long)}", hint='quote values: "a, b.jpg"')


def write_csv(path: Path, *, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a header and `rows`, every value quoted, so that line breaks and leading spaces in names survive.

    Raises:
        StorageError: if the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", errors=_FOREIGN_BYTES, newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error}", hint="free some space or choose another folder"
        ) from error

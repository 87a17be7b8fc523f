"""`finetune predict`: what is on these images, one result after the other."""

import collections
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from finetune.cli.console import ConsoleReporter, plain
from finetune.cli.parsing import parse
from finetune.errors import ConfigError, MissingExtraError, StorageError
from finetune.runs import strict_json
from finetune.runs.folder import find_model_file
from finetune.runs.model_file import read_metadata
from finetune.runs.processes import launched_rank
from finetune.runs.records import FailedPrediction, Prediction

Result = Prediction | FailedPrediction
UNREADABLE_EXIT_CODE = 3
FOREIGN_BYTES = "surrogateescape"  # file names need not be UTF-8: their bytes go out as they came in
COLUMNS = ("image", "class_name", "display_name", "probability", "abstained", "error")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Name what is on images, with the model of a run. One that cannot be read is told and does not stop the rest."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run folder or model.safetensors."""
    inputs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="INPUT")]]
    """Image files, folders or shards (.tar) of images, or patterns such as 'photos/*.jpg'."""
    top_k: int = 5
    """How many of the most probable classes to return with each image; 1 or more."""
    format: Literal["table", "json", "csv", "parquet"] = "table"
    """Form of the results; parquet needs --output."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write the results to instead of standard output."""
    dense: bool = False
    """Look at the whole picture instead of its central square: the network slides over it, and the scores of all
    positions are averaged. Pictures are then computed one by one. Not every network can."""
    batch_size: int = 32
    """Images computed at once; 1 or more."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.top_k < 1 or self.batch_size < 1:
            raise ConfigError("--top-k and --batch-size must be 1 or more")
        if not self.inputs:
            raise ConfigError("no image to predict", "name image files, folders or patterns after RUN")
        if self.format == "parquet" and self.output is None:
            raise ConfigError("--format parquet needs --output FILE")


def run(words: list[str], reporter: ConsoleReporter) -> int:
    """Predict and hand out each result as soon as it is there."""
    options = parse(PredictOptions, words, command="predict")
    metadata = read_metadata(find_model_file(options.run))

    from finetune.api import predict

    results = predict(
        options.run,
        options.inputs,
        top_k=options.top_k,
        dense=options.dense,
        batch_size=options.batch_size,
        device=options.device,
    )
    if launched_rank():  # the main process of the job writes for all
        collections.deque(results, maxlen=0)
        return 0
    failures = _Failures()
    counted = failures.count(results)
    if options.format == "parquet":
        assert options.output is not None
        write_parquet(counted, options.output)
    else:
        with _destination(options.output) as file:
            if options.format == "json":
                write_json(counted, file, model=metadata.architecture, classes=len(metadata.label_map))
            elif options.format == "csv":
                write_csv(counted, file)
            else:
                write_table(counted, file)
    if failures.number:
        reporter.say(f"{failures.number} of {failures.all} images could not be read.")
    return UNREADABLE_EXIT_CODE if failures.number else 0


def write_table(results: Iterable[Result], file: TextIO) -> None:
    """Write a line an image: name, class, probability."""
    for result in results:
        if isinstance(result, FailedPrediction):
            print(f"{plain(result.image)}: cannot be read: {result.code}: {plain(result.message)}", file=file)
        else:
            others = ", ".join(f"{plain(other.display_name)} {other.probability:.1%}" for other in result.top[1:])
            name = "none of these; nearest: " * result.abstained + plain(result.display_name)
            more = f"  ({others})" if others else ""
            print(f"{plain(result.image)}: {name} {result.probability:.1%}{more}", file=file)
        file.flush()


def write_csv(results: Iterable[Result], file: TextIO) -> None:
    """Write a row an image; an image that could not be read has its reason in the last column."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow(_row(result))
        file.flush()


def write_json(results: Iterable[Result], file: TextIO, *, model: str, classes: int) -> None:
    """Write one JSON document, a line an image, while the results come in."""
    file.write(f'{{"model": {strict_json.dump(model)}, "classes": {classes}, "predictions": [')
    separator = "\n"
    for result in results:
        file.write(separator + strict_json.dump(_document(result)))
        file.flush()
        separator = ",\n"
    file.write("\n]}\n")


def write_parquet(results: Iterable[Result], path: Path) -> None:
    """Write the rows of `write_csv` as a Parquet file.

    Raises:
        MissingExtraError: pandas or pyarrow is not installed.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401 (what pandas writes with)
    except ImportError as error:
        raise MissingExtraError(
            "--format parquet needs pandas and pyarrow", 'pip install "finetune[parquet]"'
        ) from error
    with _destination(path, binary=True) as file:
        pandas.DataFrame([_row(result) for result in results], columns=list(COLUMNS)).to_parquet(file, index=False)


class _Failures:
    """Counts the images that go by, and those among them that could not be read."""

    def __init__(self) -> None:
        self.number = 0
        self.all = 0

    def count(self, results: Iterable[Result]) -> Iterator[Result]:
        for result in results:
            self.all += 1
            self.number += isinstance(result, FailedPrediction)
            yield result


def _row(result: Result) -> dict[str, Any]:
    if isinstance(result, FailedPrediction):
        return dict.fromkeys(COLUMNS) | {"image": result.image, "error": result.code}
    return {
        "image": result.image,
        "class_name": result.class_name,
        "display_name": result.display_name,
        "probability": round(result.probability, 6),
        "abstained": result.abstained,
        "error": None,
    }


def _document(result: Result) -> dict[str, Any]:
    if isinstance(result, FailedPrediction):
        return {"image": result.image, "error": {"code": result.code, "message": result.message}}
    return {
        "image": result.image,
        "class_name": result.class_name,
        "display_name": result.display_name,
        "probability": result.probability,
        "abstained": result.abstained,
        "top": [asdict(other) for other in result.top],
    }


@contextmanager
def _destination(path: Path | None, *, binary: bool = False) -> Iterator[Any]:
    """Give standard output, or a file that appears under its name only once it is whole."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=FOREIGN_BYTES)
        yield sys.stdout
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") if binary else part.open("w", encoding="utf-8", errors=FOREIGN_BYTES, newline="") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "choose another --output") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)

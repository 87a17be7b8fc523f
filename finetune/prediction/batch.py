"""Many images: found, decoded ahead in threads, predicted in batches, handed out as soon as they are done."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from finetune.data.decode import decode_image
from finetune.data.formats import looks_like_image
from finetune.data.shards import find_shards, pictures_of
from finetune.data.transforms import to_tensor
from finetune.errors import DataError, ImageError, PredictionInputError
from finetune.prediction.classifier import Classifier
from finetune.runs.processes import ALONE, Processes, peer_faults
from finetune.runs.records import FailedPrediction, Prediction


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Turn files, folders (with all below) and patterns into a list of image paths, each input in its own order.

    A tar file, or in a folder one that is a shard by its name, stands for the pictures in it. Any other file named
    outright is taken whatever it is, so that what is wrong with it is told with its prediction, and so is a shard that
    cannot be read, unless it is the only input.

    Raises:
        DataError: The only input is a shard that cannot be read.
        PredictionInputError: An input holds no image, or a pattern matches nothing.
    """
    paths: list[Path] = []
    for text in inputs:
        path = Path(text)
        if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
            found = [Path(folder) / name for folder, _, names in _walk(path) for name in sorted(names)]
            shards = find_shards(found)
            images = [file for file in found if file in shards or _is_image(file)]
            if not (unpacked := list(_unpacked(images))):
                raise PredictionInputError(f"the folder {text} holds no images", "check the path")
            paths += unpacked
        elif not os.path.exists(path) and glob.has_magic(text):  # noqa: PTH110
            matched = sorted(Path(match) for match in glob.glob(text, recursive=True))  # noqa: PTH207 (absolute patterns too)
            if not (found := list(_unpacked(file for file in matched if file.is_file()))):
                raise PredictionInputError(f"no file with an image matches {text}", "check the pattern")
            paths += found
        else:
            found = pictures_of(path) if _is_tar(path) and len(inputs) == 1 else list(_unpacked([path]))
            if not found:
                raise PredictionInputError(f"the shard {text} holds no images", "check the path")
            paths += found
    return paths


def _is_image(file: Path) -> bool:
    return not file.name.startswith(".") and looks_like_image(file)


def _is_tar(file: Path) -> bool:
    return file.suffix.lower() == ".tar" and os.path.isfile(file)  # noqa: PTH113 (as above)


def _unpacked(files: Iterable[Path]) -> Iterator[Path]:
    """Put the pictures of a tar file in its place, unless it cannot be read."""
    for file in files:
        try:
            yield from pictures_of(file) if _is_tar(file) else [file]
        except DataError:
            yield file


def predict_many(
    classifier: Classifier,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    top_k: int = 5,
    processes: Processes = ALONE,
) -> Iterator[Prediction | FailedPrediction]:
    """Predict the images at `paths` and yield each result in their order, a batch at a time.

    An image that cannot be read yields its reason; the others go on. While a batch is computed, the next is decoded.
    Several processes take the batches in turn, and each yields the results of all.
    """
    starts = range(0, len(paths), batch_size)
    own = [path for start in processes.share(starts) for path in paths[start : start + batch_size]]
    batches = _predicted(classifier, own, batch_size=batch_size, top_k=top_k)
    with peer_faults():
        for _ in range(0, len(starts), processes.count):
            for results in processes.gather(next(batches, [])):
                yield from results


def _predicted(
    classifier: Classifier, paths: Sequence[Path], *, batch_size: int, top_k: int
) -> Iterator[list[Prediction | FailedPrediction]]:
    """Yield the results of `paths` by batches."""

    def prepare(path: Path) -> torch.Tensor | ImageError:
        try:
            image_HWC = decode_image(path, short_side_px=classifier.metadata.input_spec.resize_px)
            return torch.as_tensor(classifier.transform(to_tensor(image_HWC)))
        except ImageError as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = [(path, pool.submit(prepare, path)) for path in islice(remaining, batch_size)]
        while ahead:
            batch, ahead = ahead, [(path, pool.submit(prepare, path)) for path in islice(remaining, batch_size)]
            prepared = [(str(path), future.result()) for path, future in batch]
            yield list(_predict_batch(classifier, prepared, top_k=top_k))


def _predict_batch(
    classifier: Classifier, prepared: Sequence[tuple[str, torch.Tensor | ImageError]], *, top_k: int
) -> Iterator[Prediction | FailedPrediction]:
    readable = [(name, item) for name, item in prepared if isinstance(item, torch.Tensor)]
    predictions = iter(())  # type: Iterator[Prediction]
    if readable:
        probabilities_BK = classifier.probabilities(torch.stack([image for _, image in readable]))
        predictions = iter(classifier.describe([name for name, _ in readable], probabilities_BK, top_k=top_k))
    for name, item in prepared:
        if isinstance(item, ImageError):
            yield FailedPrediction(image=name, code=item.reason, message=item.detail)
        else:
            yield next(predictions)


def _walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield folder, folders, names

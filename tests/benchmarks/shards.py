"""Shards read at random by an index against single files in the same order, and against a stream of the same shards.

Run it with `python tests/benchmarks/shards.py`; it writes results/shards.{json,md}. 4,000 samples of 100 kB lie in 8
shards and in as many files. They are read in one random order from either, and by WebDataset from the first shard to
the last with its shuffling buffer, out of the page cache and, after asking the kernel to drop the files from it, off
the disk; nothing is decoded. Each way takes its turn five times.
"""

import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import circumstances, write_results

SAMPLES, SHARDS, SAMPLE_BYTES, RUNS = 4_000, 8, 100_000, 5
BUFFER = 1_000


def write_samples(folder: Path) -> None:
    """Write folder/shards/*.tar and folder/files/*/*.jpg of the same random bytes."""
    generator = np.random.default_rng(0)
    (folder / "shards").mkdir()
    for shard in range(SHARDS):
        (folder / "files" / f"{shard}").mkdir(parents=True)
        with tarfile.open(folder / "shards" / f"train-{shard:06d}.tar", "w") as tar:
            for number in range(SAMPLES // SHARDS):
                picture = generator.bytes(SAMPLE_BYTES)
                (folder / "files" / f"{shard}" / f"{number:06d}.jpg").write_bytes(picture)
                for name, content in ((f"{number:06d}.jpg", picture), (f"{number:06d}.cls", str(number % 10).encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    os.sync()


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files in `folder` from memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def read_table(folder: Path) -> tuple[float, int]:
    """Read every sample in a random order; return seconds and bytes."""
    from finetune.data.decode import read_image_file

    paths = TABLES[folder]
    order = np.random.default_rng(1).permutation(len(paths))
    started = time.perf_counter()
    read = sum(len(read_image_file(paths[place])) for place in order)
    return time.perf_counter() - started, read


def stream(folder: Path) -> tuple[float, int]:
    """Read every sample as WebDataset does; return seconds and bytes."""
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    started = time.perf_counter()
    samples = webdataset.WebDataset(urls, shardshuffle=SHARDS, seed=0).shuffle(BUFFER)
    read = sum(len(sample["jpg"]) for sample in samples)
    return time.perf_counter() - started, read


TABLES: dict[Path, list[Path]] = {}
WAYS: dict[str, tuple[str, Callable[[Path], tuple[float, int]]]] = {
    "files, random order": ("files", read_table),
    "shards by index, random order": ("shards", read_table),
    "shards as a stream (WebDataset)": ("shards", stream),
}


def main() -> None:
    """Measure and write the results."""
    from finetune.data.listing import list_images

    scratch = Path(tempfile.mkdtemp())
    os.environ["FINETUNE_CACHE"] = str(scratch / "cache")
    try:
        write_samples(scratch)
        started = time.perf_counter()
        listing = list_images(scratch / "shards")
        indexing = time.perf_counter() - started
        started = time.perf_counter()
        list_images(scratch / "shards")
        again = time.perf_counter() - started
        TABLES[scratch / "shards"] = [listing.root / row.image_path for row in listing.rows]
        TABLES[scratch / "files"] = sorted((scratch / "files").rglob("*.jpg"))
        seconds: dict[str, dict[str, list[float]]] = {way: {"cold": [], "warm": []} for way in WAYS}
        for _ in range(RUNS):
            for way, (kind, read) in WAYS.items():
                for state in ("cold", "warm"):
                    if state == "cold":
                        forget(scratch / kind)
                    taken, read_bytes = read(scratch / kind)
                    assert read_bytes == SAMPLES * SAMPLE_BYTES, way
                    seconds[way][state].append(taken)
    finally:
        shutil.rmtree(scratch)
    record: dict[str, Any] = circumstances("python tests/benchmarks/shards.py")
    record |= {"seconds": seconds, "indexing_seconds": indexing, "listing_again_seconds": again}
    rows = [
        f"| {way} | " + " | ".join(f"{rate(found[state])}" for state in ("cold", "warm")) + " |"
        for way, found in seconds.items()
    ]
    text = "\n".join(
        [
            f"{SAMPLES:,} samples of {SAMPLE_BYTES:,} bytes in {SHARDS} shards; samples a second, median "
            f"[least to most] of {RUNS} runs, one process that only reads.",
            "",
            "| way | off the disk | out of the page cache |",
            "|---|---:|---:|",
            *rows,
            "",
            f"Listing the shards takes {indexing:.2f} s the first time, when their index is made, and {again:.2f} s "
            "from then on.",
            "",
        ]
    )
    write_results("shards", record, title="Shards: at random or as a stream", text=text)


def rate(seconds: list[float]) -> str:
    """Return samples a second as "median [least to most]"."""
    rates = [SAMPLES / each for each in seconds]
    return f"{statistics.median(rates):,.0f} [{min(rates):,.0f} to {max(rates):,.0f}]"


if __name__ == "__main__":
    main()

"""What a folder of up to a million images costs before the first step: memory, start-up, and the shuffling of an epoch.

Run it with `python tests/benchmarks/million_images.py [IMAGES ...]`; it writes results/million_images.{json,md}. Every
size is looked at in processes of its own, first with an empty cache and then with what the first look has kept. The
images are random ones of 8 by 8 pixels in a thousand classes, so that decoding is as good as free.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from record import circumstances, write_results

SIZES = (100_000, 300_000, 1_000_000)
CLASSES = 1_000
SIDE_PX = 8
BATCH_SIZE = 256
STAGES = ("listing", "reading", "splitting", "loading")


def write_images(folder: Path, count: int) -> None:
    """Write `count` different images; the names are as long as those of ImageNet."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE_PX * SIDE_PX * 3), dtype=np.uint8)
    for number in range(CLASSES):
        (folder / f"n{number:08d}").mkdir(parents=True)
    for number, row in enumerate(pixels):
        path = f"{folder}/n{number % CLASSES:08d}/n{number % CLASSES:08d}_{number:08d}.ppm"
        with open(path, "wb") as file:  # noqa: PTH123 (a million times)
            file.write(b"P6 8 8 255\n" + row.tobytes())


def memory_mb(what: str) -> float:
    """Return the memory of this process now ("VmRSS"), or at most since it was last set back ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1000


def look(folder: Path) -> dict[str, Any]:
    """Go through all that comes before the first step, and an epoch's order; return seconds and megabytes of each."""
    from finetune.data.listing import list_images
    from finetune.data.loaders import labelled_dataset, training_loader
    from finetune.data.read import read_images
    from finetune.data.split import split_table
    from finetune.runs.records import InputSpec
    from finetune.runs.reporting import LoggingReporter

    spec = InputSpec(image_size_px=8, resize_px=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    before, found = memory_mb("VmRSS"), {}

    def ended(stage: str, started: float) -> float:
        found[stage] = {
            "seconds": time.perf_counter() - started,
            "mb": memory_mb("VmRSS") - before,
            "peak_mb": memory_mb("VmHWM") - before,
        }
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return time.perf_counter()

    started = time.perf_counter()
    listing = list_images(folder)
    started = ended("listing", started)
    images = read_images(folder, listing=listing, reporter=LoggingReporter())
    started = ended("reading", started)
    table = split_table(images.scan.table, seed=0)
    started = ended("splitting", started)
    dataset = labelled_dataset(table.select("train"), images.label_map, spec)
    loader = training_loader(dataset, batch_size=BATCH_SIZE, seed=0)
    started = ended("loading", started)
    seen = sum(len(batch) for batch in loader.batch_sampler)
    ended("shuffling", started)
    assert seen == len(dataset)
    return {"before_mb": before, "images": len(table), "stages": found}


def measure(count: int, scratch: Path) -> dict[str, Any]:
    """Return what a first and a second look at `count` images cost."""
    folder, cache = scratch / "images", scratch / "cache"
    write_images(folder, count)
    try:
        environment = {**os.environ, "FINETUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "look", str(folder)]
        outputs = [subprocess.run(command, env=environment, stdout=-1, check=True).stdout for _ in range(2)]
        first, again = (json.loads(output) for output in outputs)
        assert first["images"] == again["images"] == count
        cache_mb = sum(path.stat().st_size for path in cache.rglob("*.npz")) / 1e6
        return {"first": first, "again": again, "cache_mb": cache_mb}
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(cache, ignore_errors=True)


def page(found: Mapping[Any, dict[str, Any]]) -> str:
    """Return what was found in words."""
    lines = [
        "Random images of 8 by 8 pixels in 1,000 classes, names of 32 letters. Megabytes are what the process grew by",
        "since the imports; the peak is that of the stage. The second look finds every file unchanged in the cache.",
        "",
        "| images | stage | first look, s | second, s | kept, MB | peak first, MB | peak second, MB |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for count, both in found.items():
        for stage, first in both["first"]["stages"].items():
            again = both["again"]["stages"][stage]
            lines.append(
                f"| {int(count):,} | {stage} | {first['seconds']:.2f} | {again['seconds']:.2f} | {again['mb']:.0f} "
                f"| {first['peak_mb']:.0f} | {again['peak_mb']:.0f} |"
            )
    lines += ["", "| images | start-up first, s | start-up second, s | an epoch's order, s | cache, MB |"]
    lines.append("|---:|---:|---:|---:|---:|")
    for count, both in found.items():
        first, again = (
            sum(both[which]["stages"][stage]["seconds"] for stage in STAGES) for which in ("first", "again")
        )
        shuffling = both["again"]["stages"]["shuffling"]["seconds"]
        lines.append(f"| {int(count):,} | {first:.1f} | {again:.1f} | {shuffling:.2f} | {both['cache_mb']:.0f} |")
    largest = found[max(found, key=int)]
    lines += ["", f"The interpreter and the libraries take {largest['first']['before_mb']:.0f} MB beside that."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every size and write the results."""
    sizes = [int(word) for word in sys.argv[1:]] or SIZES
    with tempfile.TemporaryDirectory() as scratch:
        found = {count: measure(count, Path(scratch)) for count in sizes}
    record = circumstances("python tests/benchmarks/million_images.py") | {"sizes": found}
    write_results("million_images", record, title="A million images before the first step", text=page(found))
    print(page(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["look"]:
        print(json.dumps(look(Path(sys.argv[2]))))
    else:
        main()

"""Every combination in which a resumed training could differ from one that was never interrupted.

Run it with `python tests/benchmarks/exact_resume.py`; it writes results/exact_resume.{json,md}.
"""

import logging
import sys
import tempfile
import time
from pathlib import Path

from record import circumstances, write_results

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from tests.training.exact_resume import (  # noqa: E402 (found through the line above)
    EPOCHS,
    STOPS,
    all_cases,
    differences,
    save_every_epoch,
    write_images,
)


def main() -> None:
    """Walk all cases and write the results."""
    logging.getLogger("finetune").setLevel(logging.ERROR)
    save_every_epoch()
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "images"
        write_images(data)
        for number, case in enumerate(all_cases()):
            for stop in STOPS:
                different = differences(case, stop, data, Path(scratch) / str(number))
                rows.append({"case": str(case), "stop": stop, "different": different})
                print(case, stop, different or "the same bits", flush=True)
    wrong = [row for row in rows if row["different"]]
    text = f"""{len(rows) - len(wrong)} of {len(rows)} resumed trainings ended at the bits of the one that was never
stopped: {{BatchNorm CNN, dropout ViT, drop-path net}} × {{SGD, AdamW}} × {{cosine, plateau}} × EMA on and off ×
{{0, 2}} workers × a batch in {{1, 4}} parts × SIGTERM {{in mid-epoch, behind the last step of an epoch, in
evaluation}}. Compared are weights, moving average, optimiser, schedule, random generators, scores and the best weights
after {EPOCHS} epochs of 31 images.
"""
    record = circumstances("python tests/benchmarks/exact_resume.py") | {
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    write_results("exact_resume", record, title="Resumed training against uninterrupted training", text=text)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

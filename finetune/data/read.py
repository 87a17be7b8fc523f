"""From DATA, as a person gives it, to a table that can be trained on: list, scan, examine."""

from dataclasses import dataclass
from pathlib import Path

from finetune.data.check import Diagnosis, examine
from finetune.data.labels import find_label_names, read_label_names
from finetune.data.listing import Listing, list_images
from finetune.data.scan import Onlooker, Scan, scan_images
from finetune.runs.cache_folder import cache_folder
from finetune.runs.processes import ALONE, Processes
from finetune.runs.records import LabelMap
from finetune.runs.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """The readable images of DATA, the names of their classes, and what the doctor found."""

    scan: Scan
    label_map: LabelMap
    diagnosis: Diagnosis


def read_images(
    data: Path,
    *,
    listing: Listing | None = None,
    label_names: Path | None = None,
    allow_bad_images: bool = False,
    onlooker: Onlooker | None = None,
    processes: Processes = ALONE,
    reporter: Reporter,
) -> LabelledImages:
    """List and decode every image of `data` once, look up the label names, and examine the whole.

    Args:
        data: The folder or CSV.
        listing: What `list_images` found in it, if it has been asked already.
        label_names: The file with the names to show; by default a `cat_to_name.json` in or beside `data`.
        allow_bad_images: Whether more unreadable images than the rule allows are no error.
        onlooker: Is shown every picture that has to be decoded.
        processes: Those that share the work; each gets the whole result.
        reporter: Shows progress.

    Raises:
        DataError: DATA is absent or in no known layout, or the label names cannot be read.
    """
    listing = listing or list_images(data)
    with reporter.progress("Reading images", len(processes.share(listing.rows))) as advance:
        scan = scan_images(
            listing,
            cache_folder=cache_folder(),
            progress=lambda done, total: advance(1, f"{done} of {total}"),
            onlooker=onlooker,
            processes=processes,
        )
    source = label_names or find_label_names(data)
    shown = read_label_names(source) if source else {}
    if (
        source
        and not label_names
        and source.parent != data.absolute()
        and not shown.keys() & set(scan.table.class_names)
    ):
        source, shown = None, {}  # it lies beside DATA and belongs to other data
    return LabelledImages(
        scan=scan,
        label_map=LabelMap.from_names(scan.table.class_names, shown),
        diagnosis=examine(scan, shown or None, source or "", allow_bad_images=allow_bad_images),
    )

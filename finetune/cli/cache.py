"""`finetune cache`: what is kept on disk so that it need not be computed again."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

from finetune.cli.console import ConsoleReporter, plain, print_table
from finetune.cli.parsing import parse
from finetune.errors import ConfigError
from finetune.runs import strict_json
from finetune.runs.cache_folder import (
    GIGABYTE,
    CacheEntry,
    cache_folder,
    cache_limit_bytes,
    clear_cache,
    list_cache,
    prune_cache,
)


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """List what is kept on disk to save work, prune it to a size, or clear it; all of it can be computed again.

    It lies in FINETUNE_CACHE, by default ~/.cache/finetune, and keeps itself below FINETUNE_CACHE_GB, by default 20.
    Downloads of `finetune data` lie there too and are never deleted.
    """

    action: tyro.conf.Positional[Literal["list", "prune", "clear"]]
    """list shows what there is, prune deletes what was used least recently, clear deletes all."""
    format: Literal["table", "json"] = "table"
    """Form of the list."""
    max_gb: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """Gigabytes that prune leaves at most; by default the limit."""


def run(words: list[str], reporter: ConsoleReporter) -> int:  # noqa: ARG001
    """Do what the action says."""
    from rich.filesize import decimal

    options = parse(CacheOptions, words, command="cache")
    _refuse_what_cannot_be_meant(options)
    if options.action == "list":
        _show(list_cache(), options)
        return 0
    if options.action == "clear":
        freed = clear_cache()
    else:
        freed = prune_cache(cache_limit_bytes() if options.max_gb is None else round(options.max_gb * GIGABYTE))
    print(f"freed {decimal(freed)} in {cache_folder()}")
    return 0


def _refuse_what_cannot_be_meant(options: CacheOptions) -> None:
    if options.max_gb is not None and options.action != "prune":
        raise ConfigError(f"--max-gb is of no use to {options.action}", "leave it out, or prune")
    if options.max_gb is not None and not 0 <= options.max_gb < math.inf:
        raise ConfigError(f"--max-gb is {options.max_gb:g}, but must be a number, 0 or more", "use 0 to delete all")
    if options.format != "table" and options.action != "list":
        raise ConfigError(f"--format is of no use to {options.action}", "leave it out, or list")


def _show(entries: list[CacheEntry], options: CacheOptions) -> None:
    from rich.filesize import decimal

    if options.format == "json":
        rows = [{**asdict(entry), "last_used": entry.last_used.isoformat(timespec="seconds")} for entry in entries]
        print(strict_json.dump(rows, indent=1))
        return
    limit_bytes = cache_limit_bytes()
    if entries:
        print_table(
            ["kind", "what", "rows", "size", "last used"],
            [
                (
                    entry.kind,
                    plain(entry.what),
                    f"{entry.rows:,}",
                    decimal(entry.bytes),
                    f"{entry.last_used.astimezone():%Y-%m-%d}",
                )
                for entry in entries
            ],
        )
    held = sum(entry.bytes for entry in entries if entry.kind not in ("data", "unknown"))
    print(f"{decimal(held)} of at most {decimal(limit_bytes)} in {cache_folder()}")

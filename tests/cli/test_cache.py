"""`finetune cache`."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune as package
from finetune.runs.row_store import open_store


@pytest.fixture
def cache(fresh_cache: Path) -> Path:
    """A cache with a store of two rows and a download."""
    with open_store("activations", {"title": "tf_efficientnet_lite0: activations behind blocks.5\nview 3"}) as store:
        store.put("0" * 64, bytes(40_000))
        store.put("1" * 64, bytes(40_000))
    download = fresh_cache / "data" / "mnist" / "images.gz"
    download.parent.mkdir(parents=True)
    download.write_bytes(bytes(500))
    return fresh_cache


def test_the_list_is_a_table_with_a_total(finetune: Callable[..., Any], cache: Path) -> None:
    outcome = finetune("cache", "list")
    assert (outcome.code, outcome.err) == (0, "")
    (line,) = (line for line in outcome.out.splitlines() if line.split()[:1] == ["activations"])
    assert "blocks.5\\nview 3" in line
    assert "80.1 kB" in line
    assert "mnist" in outcome.out
    assert outcome.out.splitlines()[-1] == f"80.1 kB of at most 20.0 GB in {cache}"


def test_the_list_fits_a_terminal(finetune: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = re.sub(r"\x1b\[[0-9;]*m", "", finetune("cache", "list").out)
    *table, total = text.splitlines()
    assert max(map(len, table)) <= 80
    assert total.startswith("80.1 kB of at most")
    words = " ".join(table).split()
    assert {"activations", "2", "80.1", "kB", "data"} <= set(words)


def test_the_list_as_json(finetune: Callable[..., Any], cache: Path) -> None:
    store, download = json.loads(finetune("cache", "list", "--format", "json").out)
    assert (store["kind"], store["rows"], store["bytes"]) == ("activations", 2, 80_112)
    assert store["what"].startswith("tf_efficientnet_lite0")
    assert len(store["id"]) == 32
    assert store["last_used"].endswith("+00:00")
    assert (download["kind"], download["id"], download["bytes"]) == ("data", "mnist", 500)


def test_an_empty_cache_is_listed(
    finetune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "none"))
    assert finetune("cache", "list").out == f"0 bytes of at most 20.0 GB in {tmp_path / 'none'}\n"
    assert json.loads(finetune("cache", "list", "--format", "json").out) == []


def test_prune_goes_by_the_limit_or_by_what_is_asked(
    finetune: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune("cache", "prune").out == f"freed 0 bytes in {cache}\n"
    assert finetune("cache", "prune", "--max-gb", "1").out == f"freed 0 bytes in {cache}\n"
    monkeypatch.setenv("FINETUNE_CACHE_GB", "0.00005")
    outcome = finetune("cache", "prune")
    assert (outcome.code, outcome.out) == (0, f"freed 80.1 kB in {cache}\n")
    assert [entry.kind for entry in package.list_cache()] == ["data"]


def test_prune_to_nothing_and_clear_leave_downloads(finetune: Callable[..., Any], cache: Path) -> None:
    assert finetune("cache", "prune", "--max-gb", 0).out == f"freed 80.1 kB in {cache}\n"
    (cache / "scans").mkdir()
    (cache / "scans" / f"{'0' * 32}.json").write_bytes(bytes(2000))
    outcome = finetune("cache", "clear")
    assert (outcome.code, outcome.out) == (0, f"freed 2.0 kB in {cache}\n")
    assert (cache / "data" / "mnist" / "images.gz").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("list", "--max-gb", "1"),
        ("clear", "--max-gb", "1"),
        ("prune", "--max-gb", "-1"),
        ("prune", "--max-gb", "nan"),
        ("clear", "--format", "json"),
    ],
)
def test_what_cannot_be_meant_is_told_in_two_lines(
    finetune: Callable[..., Any], cache: Path, words: tuple[str, ...]
) -> None:
    outcome = finetune("cache", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert words[1] in outcome.err
    assert len(outcome.err.splitlines()) == 2
    assert len(package.list_cache()) == 2


@pytest.mark.parametrize("words", [("list",), ("prune",)])
def test_a_limit_that_is_no_number_is_told(
    finetune: Callable[..., Any], cache: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_GB", "plenty")
    outcome = finetune("cache", *words)
    assert outcome.code == 2
    assert "FINETUNE_CACHE_GB" in outcome.err
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 2


def test_python_has_the_same_verbs(cache: Path) -> None:
    assert [entry.kind for entry in package.list_cache()] == ["activations", "data"]
    assert package.prune_cache(10**6) == 0
    assert package.clear_cache() == 80_112

"""The curves in a browser: what the server answers, what it refuses, and what Chromium draws."""

import http.client
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError, RunError
from finetune.runs.folder import RunFolder, open_run
from finetune.server.watch import all_curves, curves, watch_server


def write_epoch(run: Path, number: int, *, best: int = 1) -> None:
    RunFolder(run).record(
        "epoch",
        {
            "epoch": number,
            "train_loss": 1.5 / (number + 1),
            "valid_loss": 1.7 / (number + 1),
            "train_accuracy": 1 - 0.5 / (number + 1),
            "valid_accuracy": 1 - 0.6 / (number + 1),
            "best_epoch": best,
        },
    )


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """One run with a start and three epochs, one with nothing yet, and a name that must not become markup."""
    folders = [tmp_path / name for name in ("first", "<b>second", "third")]
    for folder in folders:
        folder.mkdir()
    RunFolder(folders[0]).record("start", {"valid_loss": 2.0, "valid_accuracy": 0.25})
    for run, count in ((folders[0], 3), (folders[1], 5)):
        for number in range(1, count + 1):
            write_epoch(run, number, best=count)
    return folders


@pytest.fixture
def server(runs: list[Path]) -> Iterator[ThreadingHTTPServer]:
    with watch_server(runs) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server: ThreadingHTTPServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read().decode()


def test_the_curves_are_those_of_the_metrics(runs: list[Path]) -> None:
    found = curves(runs[0], "run")
    assert found["name"] == "run"
    assert found["epochs"] == [0, 1, 2, 3]
    assert found["train_loss"] == [None, 0.75, 0.5, 0.375]
    assert found["valid_accuracy"] == [0.25, 0.7, 0.8, 0.85]
    assert (found["best_epoch"], found["state"]) == (3, "stopped")
    (runs[0] / "model.safetensors").touch()
    assert curves(runs[0], "run")["state"] == "finished"
    (runs[0] / "config.yaml").touch()
    with open_run(runs[0], resume=True, overwrite=False):
        assert curves(runs[0], "run")["state"] == "training"
    os.utime(runs[0] / "model.safetensors", ns=(0, 0))  # the training has gone on since
    assert curves(runs[0], "run")["state"] == "stopped"
    assert curves(runs[2], "run")["epochs"] == []


def test_runs_of_one_name_are_told_apart_and_folds_are_shown(tmp_path: Path) -> None:
    for name in ("x/same", "y/same", "z/other", "z/other/folds/fold-10", "z/other/folds/fold-2"):
        (tmp_path / name).mkdir(parents=True)
        write_epoch(tmp_path / name, 1)
    runs = [tmp_path / name for name in ("x/same", "y/same", "z/../x/same", "z/other")]
    assert [run["name"] for run in all_curves(runs)] == [
        str(tmp_path / "x" / "same"),
        str(tmp_path / "y" / "same"),
        "other",
        "other fold-2",
        "other fold-10",
    ]


def test_the_answer_follows_the_training(server: ThreadingHTTPServer, runs: list[Path]) -> None:
    assert [len(run["epochs"]) for run in json.loads(ask(server, "/runs.json")[2])] == [4, 5, 0]
    write_epoch(runs[2], 1)
    assert [len(run["epochs"]) for run in json.loads(ask(server, "/runs.json")[2])] == [4, 5, 1]


def test_a_damaged_run_does_not_hide_the_others(server: ThreadingHTTPServer, runs: list[Path]) -> None:
    for damage in (b"no json\n", b"\xff\n", b"5\n", b'{"x": 1}\n'):
        (runs[1] / "metrics.jsonl").write_bytes(damage)
        first, second, _ = json.loads(ask(server, "/runs.json")[2])
        assert first["epochs"] == [0, 1, 2, 3]
        assert second["epochs"] == []
        assert "is damaged" in second["state"]


def test_the_page_may_load_nothing_from_elsewhere(server: ThreadingHTTPServer) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert not re.findall(r"https?://", page)
    for path in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert ask(server, f"/{path}")[0] == 200


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/runs", "/watch_page/index.html", "/%2e%2e/x", "/runs.json?x=1"]
)
def test_nothing_else_is_served(server: ThreadingHTTPServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_a_page_of_another_name_is_refused(server: ThreadingHTTPServer) -> None:
    assert ask(server, "/runs.json", Host="evil.example")[0] == 403
    assert ask(server, "/runs.json", Host=f"localhost:{server.server_port}")[0] == 200


def test_only_reading_is_known(server: ThreadingHTTPServer) -> None:
    assert ask(server, "/runs.json", method="POST")[0] == 501


def test_what_cannot_be_watched_is_refused(tmp_path: Path, server: ThreadingHTTPServer, finetune: Any) -> None:
    with pytest.raises(RunError, match=r"there is no run folder .*nowhere"):
        watch_server([tmp_path / "nowhere"])
    for port in (server.server_port, 99_999):
        with pytest.raises(ConfigError, match="cannot be had"):
            watch_server([tmp_path], port=port)
    assert finetune("watch").code == 2
    assert finetune("watch", str(tmp_path / "nowhere")).code == 4


def rendered(server: ThreadingHTTPServer, folder: Path) -> str:
    """Return the page as Chromium has made it after a few seconds."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        message = "no Chromium: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"http://127.0.0.1:{server.server_port}/"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.browser
def test_chromium_draws_every_run_and_what_comes_later(
    server: ThreadingHTTPServer, runs: list[Path], tmp_path: Path
) -> None:
    page = rendered(server, tmp_path / "browser")
    lines = re.findall(r'<polyline class="line (\w+)" stroke="(#\w+)" points="([^"]*)"', page)
    assert len(lines) == 3 * 2 * 2  # runs, phases, measures
    drawn = [len(points.split()) for phase, _, points in lines if phase == "valid"]
    assert drawn == [4, 5, 0, 4, 5, 0]
    assert len({colour for _, colour, _ in lines}) == 3
    assert "&lt;b&gt;second" in page
    assert "85.0 %" in page
    assert "stopped" in page
    assert ">none is training<" in page
    write_epoch(runs[2], 1)
    later = re.findall(r'<polyline class="line valid" stroke="#\w+" points="([^"]*)"', rendered(server, tmp_path / "b"))
    assert [len(points.split()) for points in later] == [4, 5, 1, 4, 5, 1]

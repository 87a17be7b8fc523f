"""Live curves in a browser: one page, and the epochs of the watched runs as JSON, read anew at every request."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, RunError
from finetune.runs import strict_json
from finetune.runs.folder import RunFolder, is_training

PAGE = files("finetune.server") / "watch_page"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/watch.js": ("watch.js", "text/javascript; charset=utf-8"),
    "/watch.css": ("watch.css", "text/css; charset=utf-8"),
}
LOOPBACK = "127.0.0.1"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
SERIES = ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy")


def watch_server(runs: Sequence[Path], *, port: int = 0) -> ThreadingHTTPServer:
    """Return a server, not yet serving, that shows the curves of `runs` on the loopback of this machine.

    Args:
        runs: Run folders, finished or not; one without an epoch yet has no curves.
        port: 0 takes any that is free.

    Raises:
        RunError: One of `runs` is no folder.
        ConfigError: The port cannot be had.
    """
    if missing := [str(run) for run in runs if not run.is_dir()]:
        raise RunError(f"there is no run folder {', '.join(missing)}", "start the training first")
    try:
        server = ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, runs))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port {port} cannot be had: {error}", "name another --port, or 0 for any") from error
    server.daemon_threads = True
    return server


def all_curves(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the `curves` of each of `runs` once, and of the folds of a cross-validation, under names of their own."""
    folders = dict.fromkeys(run.resolve() for run in runs)
    taken = Counter(folder.name for folder in folders)
    named = {folder: folder.name if taken[folder.name] == 1 else str(folder) for folder in folders}
    found = []
    for folder, name in named.items():
        folds = sorted(RunFolder(folder).folds.glob("fold-*"), key=lambda fold: (len(fold.name), fold.name))
        found += [curves(folder, name), *(curves(fold, f"{name} {fold.name}") for fold in folds)]
    return found


def curves(run: Path, name: str) -> dict[str, Any]:
    """Return the epochs of a run folder: its `name`, the number of each epoch, and a list for each of `SERIES`.

    Epoch 0 is the start, which has no training scores. `best_epoch` is the one whose weights are kept so far, and
    `state` is "training", "finished", "stopped" or what is wrong with the folder.
    """
    folder = RunFolder(run)
    try:
        events = folder.events()
        state = "training" if is_training(folder) else "finished" if _is_finished(folder) else "stopped"
    except (RunError, OSError) as error:
        events, state = [], str(error)
    epochs = [event | {"epoch": 0} for event in events if event["event"] == "start"]
    epochs += [event for event in events if event["event"] == "epoch"]
    return {
        "name": name,
        "epochs": [event["epoch"] for event in epochs],
        **{name: [event.get(name) for event in epochs] for name in SERIES},
        "best_epoch": epochs[-1].get("best_epoch") if epochs else None,
        "state": state,
    }


def _is_finished(run: RunFolder) -> bool:
    """Whether the model was written after the last event: an older one is that of a training since gone on with."""
    return run.model.exists() and run.model.stat().st_mtime_ns >= run.metrics.stat().st_mtime_ns


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for the page, its files and /runs.json; whatever else is refused."""

    def __init__(self, runs: Sequence[Path], *arguments: Any) -> None:
        self.runs = runs
        super().__init__(*arguments)

    def do_GET(self) -> None:
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if host not in (LOOPBACK, "localhost"):  # another name that leads here is a page that should not see this
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path in PAGE_FILES:
            name, kind = PAGE_FILES[self.path]
            self._answer(PAGE.joinpath(name).read_bytes(), kind)
        elif self.path == "/runs.json":
            self._answer(strict_json.dump(all_curves(self.runs)).encode(), "application/json")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a browser asks every second."""

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

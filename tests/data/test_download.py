"""Downloads from a server on this machine that behaves as well, and as badly, as real ones."""

import hashlib
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
import pytest

from finetune.data import download
from finetune.data.download import fetch
from finetune.errors import DataError, StorageError
from finetune.runs.reporting import Advance, LoggingReporter

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
PROGRESS = LoggingReporter().progress


@dataclass
class Site:
    """What the server offers: files by path, whether it knows Range, and after how many bytes it hangs up."""

    files: dict[str, bytes]
    takes_range: bool = True
    breaks: list[int] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Serve `site` on a free port until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            if self.path not in site.files:
                self.send_error(404)
                return
            content, start = site.files[self.path], 0
            if wanted and site.takes_range:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            length = site.breaks.pop(0) if site.breaks else len(content)
            self.wfile.write(content[start : start + length])

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site({"/set.tgz": CONTENT})) as site:
        yield site


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "set.tgz"


def test_a_file_arrives_whole_and_is_not_asked_for_again(site: Site, target: Path) -> None:
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["set.tgz"]
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert site.asked == [("/set.tgz", None)]


def test_a_damaged_file_under_the_right_name_is_replaced(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT[:-1] + b"?")
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT


def test_broken_answers_are_resumed_where_they_broke(site: Site, target: Path) -> None:
    site.breaks += [1_000_000, 500_000]
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT
    assert [wanted for _, wanted in site.asked] == [None, "bytes=1000000-", "bytes=1500000-"]


def test_the_next_call_goes_on_where_a_hopeless_one_stopped(site: Site, target: Path) -> None:
    site.breaks += [100_000] * 5
    with pytest.raises(DataError, match="broke 5 times"):
        fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert not target.exists()
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT
    assert site.asked[-1] == ("/set.tgz", "bytes=500000-")


def test_an_interrupt_keeps_what_came(site: Site, target: Path) -> None:
    @contextmanager
    def interrupting(_label: str, total: int) -> Iterator[Advance]:
        assert total == 3

        def advance(count: int, _text: str) -> None:
            if count:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=interrupting)
    kept = target.with_name("set.tgz.part").stat().st_size
    assert kept >= 1_000_000
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT
    assert site.asked[-1] == ("/set.tgz", f"bytes={kept}-")


def test_a_server_that_knows_no_range_starts_over(site: Site, target: Path) -> None:
    site.takes_range = False
    site.breaks.append(1_000_000)
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT


def test_a_complete_part_needs_its_name_only(site: Site, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("set.tgz.part").write_bytes(CONTENT)
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("length", [1_000, 4_000_000])
def test_a_part_of_another_file_is_thrown_away(site: Site, target: Path, length: int) -> None:
    target.parent.mkdir()
    target.with_name("set.tgz.part").write_bytes(b"?" * length)
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert target.read_bytes() == CONTENT


def test_another_file_than_the_published_one_is_refused_and_not_kept(site: Site, target: Path) -> None:
    site.files["/set.tgz"] = CONTENT[::-1]
    with pytest.raises(DataError, match=f"not the published file.*{MD5}"):
        fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert list(target.parent.iterdir()) == []
    assert len(site.asked) == 1


def test_a_file_that_is_gone_is_told_with_the_address_and_the_way_out(site: Site, target: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tgz: the server answers 404") as caught:
        fetch(f"{site.url}/gone.tgz", target, md5=MD5, progress=PROGRESS)
    assert str(target) in caught.value.hint


def test_a_refused_connection_is_told_at_once(target: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: whoever calls is refused
        with pytest.raises(DataError, match="Connection refused"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/set.tgz", target, md5=MD5, progress=PROGRESS)


def test_a_server_that_falls_silent_is_not_waited_for(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DataError, match="timed out"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/set.tgz", target, md5=MD5, progress=PROGRESS)


def test_an_answer_that_is_no_http_is_told(target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"good day\r\n\r\n")

        thread = Thread(target=answer)
        thread.start()
        with pytest.raises(DataError, match="good day"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/set.tgz", target, md5=MD5, progress=PROGRESS)
        thread.join()


def test_the_switch_of_the_environment_forbids_downloads_but_not_what_is_here(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert site.asked == []
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)


def test_a_disk_without_room_is_told_before_anything_is_received(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2_000_000))
    with pytest.raises(StorageError, match=r"needs 3 MB more.* has 2 MB"):
        fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)
    assert list(target.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_matter_of_storage(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        fetch(f"{site.url}/set.tgz", tmp_path / "file" / "set.tgz", md5=MD5, progress=PROGRESS)


def test_a_disk_that_fills_up_is_a_matter_of_storage(site: Site, target: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    target.parent.mkdir()
    target.with_name("set.tgz.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        fetch(f"{site.url}/set.tgz", target, md5=MD5, progress=PROGRESS)

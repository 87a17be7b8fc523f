"""The run folder: its name, who may write in it, and files that are whole or not there."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.errors import RunError, StorageError
from finetune.runs.folder import RunFolder, find_model_file, next_free_folder, open_run, write_whole

HOLD = """
import sys
from pathlib import Path
from finetune.runs.folder import open_run
with open_run(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process_in(path: Path) -> Iterator[int]:
    """Let a second process hold the run folder at `path`; yield its pid."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        try:
            yield process.pid
        finally:
            process.communicate()


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """Return a run folder that holds files and folders, with nobody in it."""
    run = RunFolder(tmp_path / "run")
    with open_run(run.path):
        run.config.write_text("seed: 1\n")
        run.model.write_bytes(b"weights")
        run.plots.mkdir()
        (run.plots / "curves.png").write_bytes(b"png")
    return run


def names_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} - {".lock"}


def test_every_file_lies_in_the_folder_under_its_fixed_name() -> None:
    run = RunFolder(Path("r"))
    assert [
        path.name
        for path in (run.config, run.environment, run.split, run.bad_files, run.advice, run.metrics, run.model)
    ] == [
        "config.yaml",
        "environment.json",
        "split.csv",
        "bad_files.csv",
        "advice.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    assert [run.predictions.name, run.checkpoints.name, run.plots.name] == ["predictions.csv", "checkpoints", "plots"]
    assert run.plots.parent == run.path


@pytest.mark.parametrize(
    ("data", "model", "name"),
    [
        ("photos/flowers", "resnet50", "flowers-resnet50"),
        ("photos/flowers/", "resnet50", "flowers-resnet50"),
        ("photos/list.csv", "resnet50", "list-resnet50"),
        ("flowers", "timm/convnext_tiny.fb_in22k", "flowers-timm-convnext_tiny.fb_in22k"),
        ("my photos (2)", "alexnet", "my-photos-2-alexnet"),
        ("花", "alexnet", "花-alexnet"),
        ("🌹", "alexnet", "data-alexnet"),
        ("/", "alexnet", "data-alexnet"),
    ],
)
def test_default_name_tells_data_and_model(data: str, model: str, name: str) -> None:
    assert next_free_folder(data, model) == Path("runs") / name


def test_default_name_keeps_the_version_in_a_folder_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flowers.v2").mkdir()
    assert next_free_folder("flowers.v2", "resnet50") == Path("runs/flowers.v2-resnet50")


def test_default_name_counts_on_where_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("flowers-vgg", "flowers-vgg-2", "flowers-vgg-3"):
        folder = next_free_folder("flowers", "vgg")
        assert folder == Path("runs") / name
        folder.mkdir(parents=True)
    Path("runs/flowers-vgg-2").rmdir()
    assert next_free_folder("flowers", "vgg") == Path("runs/flowers-vgg-2")


def test_new_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    with open_run(tmp_path / "a" / "b") as run:
        assert run.path.is_dir()
        assert names_in(run.path) == set()


def test_empty_folder_is_used_with_and_without_overwrite(tmp_path: Path) -> None:
    for overwrite in (False, True):
        with open_run(tmp_path / "run", overwrite=overwrite) as run:
            assert names_in(run.path) == set()


def test_folder_that_is_not_empty_is_refused(finished: RunFolder) -> None:
    before = names_in(finished.path)
    with pytest.raises(RunError, match="is not empty") as caught, open_run(finished.path):
        pytest.fail("opened")
    assert "--resume" in caught.value.hint
    assert "--overwrite" in caught.value.hint
    assert names_in(finished.path) == before


def test_overwrite_empties_a_run(finished: RunFolder) -> None:
    with open_run(finished.path, overwrite=True):
        assert names_in(finished.path) == set()


def test_overwrite_removes_links_and_not_what_they_point_to(finished: RunFolder, tmp_path: Path) -> None:
    kept = tmp_path / "photos"
    kept.mkdir()
    (kept / "rose.jpg").write_bytes(b"rose")
    shutil.rmtree(finished.path / "plots")
    (finished.path / "plots").symlink_to(kept)
    with open_run(finished.path, overwrite=True):
        assert names_in(finished.path) == set()
    assert (kept / "rose.jpg").read_bytes() == b"rose"


def test_overwrite_spares_a_run_that_someone_has_put_files_into(finished: RunFolder) -> None:
    before = names_in(finished.path)
    (finished.path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"notes\.txt"), open_run(finished.path, overwrite=True):
        pytest.fail("the folder was opened")
    assert names_in(finished.path) == before | {"notes.txt"}


def test_a_model_kept_alone_is_not_taken_for_a_failed_start(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(RunError, match="is not empty"), open_run(tmp_path):
        pytest.fail("the folder was opened")
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_what_a_failed_start_has_left_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "bad_files.csv").write_text("path,reason,detail")
    with open_run(tmp_path):
        assert names_in(tmp_path) == set()


def test_overwrite_spares_a_folder_that_holds_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with (
        pytest.raises(RunError, match=r"holds files of other origin: thesis\.tex"),
        open_run(tmp_path, overwrite=True),
    ):
        pytest.fail("opened")
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_file_in_place_of_a_folder_is_refused(tmp_path: Path, options: dict[str, bool]) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(RunError, match="is a file, not a run folder"), open_run(file, **options):
        pytest.fail("opened")
    assert file.read_text() == "mine"


def test_folder_that_cannot_be_created_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot write to the run folder"), open_run(tmp_path / "file" / "run"):
        pytest.fail("opened")


def test_lock_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError), open_run(tmp_path):
        pytest.fail("opened")


def test_resume_keeps_the_files(finished: RunFolder) -> None:
    with open_run(finished.path, resume=True) as run:
        assert names_in(run.path) == {"config.yaml", "model.safetensors", "plots"}


def test_resume_needs_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RunError, match="there is no run to resume"), open_run(path, resume=True):
            pytest.fail("opened")
    assert not (tmp_path / "absent").exists()


def test_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with other_process_in(path) as pid:
        (path / "config.yaml").write_text("seed: 1\n")
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(RunError, match=f"process {pid} is training in"), open_run(path, **options):
                pytest.fail("opened")
        assert names_in(path) == {"config.yaml"}, "the refused process emptied the folder"
    with open_run(path, resume=True):
        assert (path / ".lock").read_text() == str(os.getpid())


ORPHANED = """
import os, sys, time
from pathlib import Path
from finetune.runs.folder import open_run
with open_run(Path(sys.argv[1])):
    if (child := os.fork()) == 0:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_process_that_outlives_the_one_that_trained_holds_nothing(tmp_path: Path) -> None:
    """Such as one that decodes images, after a kill."""
    path = tmp_path / "run"
    command = [sys.executable, "-c", ORPHANED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        orphan = int(training.stdout.readline())
        try:
            with pytest.raises(RunError, match=f"process {training.pid} is training in"), open_run(path):
                pytest.fail("opened")
            training.kill()
            training.wait()
            with open_run(path):
                os.kill(orphan, 0)  # it is there
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_lock_is_let_go_when_training_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "run"):
        raise ZeroDivisionError
    with open_run(tmp_path / "run"):
        pass


def test_write_whole_writes_text_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for content in ("größer", b"\x00\xff"):
        write_whole(file, content)
        assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names_in(tmp_path) == {"a"}


def test_write_whole_leaves_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "a"
    write_whole(file, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=f"cannot write {file}: No space left on device"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert names_in(tmp_path) == {"a"}


def test_write_whole_into_no_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        write_whole(tmp_path / "absent" / "a", "x")


def test_an_event_that_the_disk_takes_a_part_of_is_taken_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record("epoch", {"epoch": 0})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 10, limit[1]))
        with pytest.raises(StorageError, match=r"metrics\.jsonl: File too large"):
            run.record("epoch", {"epoch": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    run.record("epoch", {"epoch": 2})
    assert [event["epoch"] for event in run.events()] == [0, 2]


def test_events_come_back_in_order(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.events() == []
    run.record("epoch", {"epoch": 0, "loss": 0.5})
    run.record("scores", {"name": "größer\u2028"})
    assert run.events() == [
        {"event": "epoch", "epoch": 0, "loss": 0.5},
        {"event": "scores", "name": "größer\u2028"},
    ]


def test_event_that_is_no_json_is_refused_before_it_is_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record("epoch", {"loss": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        run.record("epoch", {"loss": float("nan")})
    assert run.events() == [{"event": "epoch", "loss": 0.5}]


@pytest.mark.parametrize("cut", ['{"event": "epo', '{"event": "epoch", "epoch": 1}', ""])
def test_last_line_cut_off_by_a_kill_is_left_out(tmp_path: Path, cut: str) -> None:
    run = RunFolder(tmp_path)
    run.record("epoch", {"epoch": 0})
    with run.metrics.open("a") as file:
        file.write(cut)
    assert run.events() == [{"event": "epoch", "epoch": 0}]


def test_damaged_line_is_a_run_error_that_names_the_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"event": "epo{"event": "epoch"}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        run.events()


def test_model_file_is_found_in_a_run_or_by_its_own_path(finished: RunFolder) -> None:
    assert find_model_file(finished.path) == finished.model
    assert find_model_file(finished.model) == finished.model


def test_absent_model_file_is_told_apart_from_an_unfinished_run(finished: RunFolder) -> None:
    finished.model.unlink()
    with pytest.raises(RunError, match=r"holds no model\.safetensors") as caught:
        find_model_file(finished.path)
    assert caught.value.hint == "train one first"
    (finished.checkpoints / "step-000000003").mkdir(parents=True)
    with pytest.raises(RunError, match=r"holds no model\.safetensors") as caught:
        find_model_file(finished.path)
    assert "--resume" in caught.value.hint
    with pytest.raises(RunError, match="there is no run folder or model file"):
        find_model_file(finished.path / "absent")

"""What tests of several rooms share: the example data, real photographs, the command line in this process."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side the threads of one test would wait for those of another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]
EXAMPLES = PROJECT / "data_examples"
STAMPS = Path("/usr/share/tuxpaint/stamps")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is cached by the tests away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Begin with an empty cache, the folder of which is returned: it is there as soon as something is kept."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(folder))
    monkeypatch.delenv("FINETUNE_CACHE_GB", raising=False)
    return folder


@pytest.fixture(scope="session")
def flowers() -> Path:
    """The example flowers that the repository carries."""
    return EXAMPLES / "flowers"


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Import a script of data_examples by its file name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def stamps(tmp_path_factory: pytest.TempPathFactory, load_script: Callable[[str], ModuleType]) -> Path:
    """The real photographs as an image folder; where CI promises them, their absence is a failure."""
    if not STAMPS.is_dir():
        message = f"{STAMPS} is missing: install the Debian package tuxpaint-stamps-default"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    folder = tmp_path_factory.mktemp("photos") / "stamps"
    load_script("stamps").build_stamps(folder)
    return folder


@pytest.fixture(scope="session")
def flowers_run(tmp_path_factory: pytest.TempPathFactory, flowers: Path) -> Path:
    """A finished run on the flowers, made by the command line; its head looks at all stages."""
    from finetune.cli.main import main

    run = tmp_path_factory.mktemp("runs") / "flowers"
    options = ["--feature-extract", "--head-stages", "all", "--quiet"]
    assert main(["train", str(flowers), *options, "--output", str(run)]) == 0
    return run


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def finetune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process."""

    def run(*words: object) -> Outcome:
        from finetune.cli.main import main

        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run

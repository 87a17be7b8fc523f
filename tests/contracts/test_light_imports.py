"""What must answer at once loads nothing heavy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "torchvision", "timm", "sklearn", "matplotlib", "accelerate", "PIL", "numpy"}


def heavy_modules(code: str) -> set[str]:
    """Run `code` in a fresh interpreter and return the heavy packages it has loaded."""
    script = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return HEAVY & {name.partition(".")[0] for name in json.loads(result.stderr.splitlines()[-1])}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_modules("import finetune; dir(finetune); finetune.TrainConfig; finetune.DataError") == set()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["predict", "--help"],
        ["evaluate", "--help"],
        ["advise", "--help"],
        ["check", "--help"],
        ["inspect", "--help"],
        ["explain", "--help"],
        ["data", "--help"],
        ["models", "--help"],
        ["config", "--help"],
        ["config", "show"],
        ["cache", "--help"],
        ["cache", "list"],
        ["cache", "prune"],
        ["cache", "clear"],
        ["train", "x", "--epochs", "-1"],
    ],
)
def test_help_and_usage_errors_load_nothing_heavy(words: list[str]) -> None:
    code = f"from finetune.cli.main import main\ntry: main({words!r})\nexcept SystemExit: pass\nimport contextlib"
    assert heavy_modules(code) == set()


def test_checking_images_loads_no_torch(tmp_path: Path, flowers: Path) -> None:
    code = f"from finetune.cli.main import main\nmain(['check', {str(flowers)!r}, '--quiet'])"
    assert "torch" not in heavy_modules(code)

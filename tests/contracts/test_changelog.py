"""The top version of the changelog is the package's."""

import re
from pathlib import Path

import finetune


def test_the_changelogs_top_version_is_the_packages() -> None:
    text = (Path(finetune.__file__).parent / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", text, flags=re.MULTILINE)[0] == finetune.__version__

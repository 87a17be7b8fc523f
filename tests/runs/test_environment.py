"""environment.json says on what a run was made."""

import sys

import numpy as np

from finetune.runs import strict_json
from finetune.runs.environment import PACKAGES, describe_environment


def test_versions_device_and_seed_are_told() -> None:
    found = describe_environment(device="cpu", processes=3, threads=2, precision="bf16", seed=7)
    assert [found[name] for name in ("device", "processes", "threads", "precision", "seed")] == ["cpu", 3, 2, "bf16", 7]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert tuple(found["packages"]) == PACKAGES
    assert found["packages"]["numpy"] == np.__version__
    assert strict_json.parse(strict_json.dump(found)) == found


def test_package_that_is_not_installed_has_no_version(monkeypatch) -> None:
    monkeypatch.setattr("finetune.runs.environment.PACKAGES", ("numpy", "no-such-package-anywhere"))
    assert (
        describe_environment(device="cpu", processes=1, threads=1, precision="fp32", seed=0)["packages"][
            "no-such-package-anywhere"
        ]
        is None
    )

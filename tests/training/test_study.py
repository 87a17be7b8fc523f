"""What the frozen network makes of the images; of few of them, the probe learns from views too."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune.config.schema import TrainConfig
from finetune.data.listing import list_images
from finetune.data.scan import scan_images
from finetune.data.table import ImageRow, ImageTable
from finetune.features import extract
from finetune.features.extract import Features, TrunkPass
from finetune.features.probe import Probe, solve_probe
from finetune.features.trunk import pooled_trunk
from finetune.models.initialize import Backbone, build_backbone
from finetune.models.stage_outputs import stage_ends
from finetune.runs import strict_json
from finetune.runs.folder import RunFolder
from finetune.runs.records import LabelMap
from finetune.runs.reporting import LoggingReporter
from finetune.training import study as study_module
from finetune.training.start import study_trunk
from finetune.training.study import (
    BELOW_IMAGES,
    FEW_IMAGES,
    VIEWS_OF_FEW,
    Study,
    is_sampled,
    sample_to_study,
    study_images,
)
from tests.training.exact_resume import write_images

pytestmark = pytest.mark.usefixtures("fresh_cache")

LABELS = LabelMap.from_names(["a", "b"], {})
Array = np.ndarray[Any, Any]
Look = Callable[..., tuple[Study, list[Array]]]


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("resnet18", num_classes=2, use_pretrained=False, image_size=32)


@pytest.fixture
def make_table(tmp_path: Path) -> Callable[[int], ImageTable]:
    """List random images: so many of each class to learn from, and one held back."""

    def make(per_class: int) -> ImageTable:
        generator = np.random.default_rng(0)
        data = tmp_path / f"data{per_class}"
        for split, count in (("train", per_class), ("valid", 1)):
            for name in (f"{label}/{number}.png" for label in "ab" for number in range(count)):
                path = data / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(path)
        return scan_images(list_images(data)).table

    return make


@pytest.fixture
def look(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Study the images; return also the features of the views that the probe was given."""

    def study(table: ImageTable, **options: Any) -> tuple[Study, list[Array]]:
        given: list[Array] = []

        def solve(*args: Any, views: Sequence[Array], **others: Any) -> Probe:
            given.extend(views)
            return solve_probe(*args, views=views, **others)

        monkeypatch.setattr(study_module, "solve_probe", solve)
        place = {"data_root": table.root, "images": len(table), "device": torch.device("cpu")}
        with TrunkPass(pooled_trunk(backbone), **place, reporter=LoggingReporter()) as trunk_pass:
            found = study_images(trunk_pass, table, LABELS, **{"seed": 0, **options}, reporter=LoggingReporter())
        return found, given

    return study


def test_of_few_images_the_probe_learns_from_views_too(look: Look, make_table: Callable[[int], ImageTable]) -> None:
    study, views = look(make_table(FEW_IMAGES))
    assert study.views == len(views) == VIEWS_OF_FEW
    for number, view_ND in enumerate(views):
        assert view_ND.shape == study.train.features_ND.shape
        others = [study.train.features_ND, *views[:number]]
        assert not any(np.allclose(view_ND, other_ND, atol=1e-3) for other_ND in others), "each is another change"


@pytest.mark.parametrize(
    ("per_class", "options"),
    [(FEW_IMAGES + 1, {}), (2, {"augmentation": "none"}), (2, {"augmentation": "flowers"}), (2, {"looks_at": "none"})],
    ids=["more images", "no augmentation", "a wild augmentation", "no probe"],
)
def test_no_views_are_computed(
    per_class: int, options: dict[str, Any], look: Look, make_table: Callable[[int], ImageTable]
) -> None:
    study, views = look(make_table(per_class), **options)
    assert study.views == len(views) == 0


@pytest.mark.parametrize(("looks_at", "is_better"), [("auto", True), ("auto", False), ("all", False), ("last", True)])
def test_the_head_looks_at_all_stages_where_that_does_better(
    looks_at: str,
    is_better: bool,
    backbone: Backbone,
    make_table: Callable[[int], ImageTable],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = stage_ends(backbone.module, backbone.stages, backbone.input_spec)
    trunk = pooled_trunk(backbone, tuple(ends))

    def solve(train: Features, **options: Any) -> Probe:
        is_wide = train.features_ND.shape[1] == trunk.width + sum(ends.values())
        return replace(solve_probe(train, **options), loss=0.5 if is_wide is is_better else 0.6)

    monkeypatch.setattr(study_module, "solve_probe", solve)
    table = make_table(8)
    with TrunkPass(
        trunk, data_root=table.root, images=len(table), device=torch.device("cpu"), reporter=LoggingReporter()
    ) as trunk_pass:
        found = study_images(trunk_pass, table, LABELS, seed=0, looks_at=looks_at, reporter=LoggingReporter())
    is_wide = looks_at == "all" or (looks_at == "auto" and is_better)
    assert found.probe is not None
    assert found.head is not None
    assert found.head_inputs == (tuple(ends) if is_wide else ())
    assert found.head.weight_KD.shape[1] == trunk.width + (sum(ends.values()) if is_wide else 0)
    assert found.probe.weight_KD.shape[1] == found.train.features_ND.shape[1] == trunk.width, "evidence is the last's"
    assert found.baselines.probe is not None


@pytest.mark.parametrize(
    ("options", "is_wide"),
    [
        ({}, True),
        ({"head_stages": "last", "head": "knn"}, True),
        ({"images": BELOW_IMAGES}, False),
        ({"images": BELOW_IMAGES, "head_stages": "all"}, True),
        ({"WIDEST_NUMBERS": 1000}, False),
    ],
    ids=str,
)
def test_the_outputs_of_all_stages_are_kept_of_not_too_many_images(
    options: dict[str, Any], is_wide: bool, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "WIDEST_NUMBERS", options.pop("WIDEST_NUMBERS", 2**26))
    images = options.pop("images", 100)
    assert bool(study_trunk(TrainConfig(**options), backbone, images=images).outputs) is is_wide


def test_views_are_computed_once_for_a_seed(
    look: Look, make_table: Callable[[int], ImageTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(2)
    _, views = look(table)
    _, others = look(table, seed=1)
    assert not any(np.allclose(view_ND, other_ND, atol=1e-3) for view_ND, other_ND in zip(views, others, strict=True))
    monkeypatch.setattr(extract, "decode_image", pytest.fail)
    _, again = look(table)
    assert np.array_equal(again, views)


@pytest.fixture
def _twenty_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MANY_IMAGES": 20, "STUDIED_IMAGES": 12, "LITTLE_BELOW": 2}.items():
        monkeypatch.setattr(study_module, name, value)


@pytest.mark.usefixtures("_twenty_are_many")
def test_of_very_many_images_a_sample_is_studied_that_has_every_class(tmp_path: Path) -> None:
    counts = {"a": 40, "b": 1, "c": 19}
    rows = [
        ImageRow(image_path=f"{split}/{label}/{number}.png", label=label, split=split)
        for split, share in (("train", 1), ("valid", 0.25), ("test", 1))
        for label, count in counts.items()
        for number in range(math.ceil(count * share))
    ]
    table = ImageTable(tmp_path, rows)
    sample = sample_to_study(table, seed=0)
    found = Counter((row.split, row.label) for row in sample.rows)
    assert [found["train", label] for label in "abc"] == [8, 1, 4], "in proportion, and one of the class between"
    assert [found["valid", label] for label in "abc"] == [7, 1, 4]
    assert found.total() == 25, "none of test"
    assert sample_to_study(table, seed=0) == sample != sample_to_study(table, seed=1)
    assert is_sampled(21, classes=3)
    assert not is_sampled(20, classes=3)
    assert not is_sampled(21, classes=11), "of few images a class all are studied"


@pytest.mark.usefixtures("_twenty_are_many")
@pytest.mark.parametrize(("scenario", "computed"), [("large-similar", 24), ("small-similar", 43)])
def test_a_training_of_very_many_images_starts_from_a_study_of_some(
    tmp_path: Path, scenario: str, computed: int
) -> None:
    write_images(tmp_path / "data")
    options = {"model": "timm/test_resnet", "use_pretrained": False, "image_size": 32, "workers": 0, "epochs": 1}
    run = finetune.train(tmp_path / "data", output=tmp_path / "run", scenario=scenario, **options)
    (features,) = (event for event in RunFolder(run.folder).events() if event["event"] == "features")
    assert features["computed"] == computed
    assert strict_json.parse(RunFolder(run.folder).advice.read_bytes())["evidence"]["images"] == 31
    assert run.metrics["valid"].images == 12

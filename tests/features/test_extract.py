"""The frozen layers run once for an image: what the cache has is read, and only if it is what was asked for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune.features.engine as engine_module
import finetune.features.extract as extract_module
from finetune.data.decode import decode_image
from finetune.data.listing import list_images
from finetune.data.scan import scan_images
from finetune.data.table import ImageTable
from finetune.data.transforms import evaluation_transform, to_tensor, training_transform
from finetune.errors import DataError, ModelError
from finetune.features.cache import ActivationCache, View
from finetune.features.cut import cut_model
from finetune.features.extract import TrunkPass
from finetune.features.trunk import Trunk, boundary_trunk, map_dtype, pooled_trunk
from finetune.models.heads import head_module
from finetune.models.initialize import Backbone, build_backbone
from finetune.runs.records import LabelMap
from finetune.runs.reporting import LoggingReporter

pytestmark = pytest.mark.usefixtures("fresh_cache")

CPU = torch.device("cpu")
Begin = Callable[..., TrunkPass]
LABELS = LabelMap.from_names(["a", "b"], {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("resnet18", num_classes=2, use_pretrained=False, image_size=32)


def boundary(backbone: Backbone, frozen: int) -> Trunk:
    return boundary_trunk(backbone, cut_model(backbone.module, backbone.stages, frozen), frozen)


def table_of(folder: Path) -> ImageTable:
    return scan_images(list_images(folder)).table


@pytest.fixture
def trunk_pass(tmp_path: Path) -> Iterator[Begin]:
    with ExitStack() as stack:

        def begin(trunk: Trunk, **options: object) -> TrunkPass:
            begun = TrunkPass(
                trunk, data_root=tmp_path / "data", images=20, device=CPU, reporter=LoggingReporter(), **options
            )  # type: ignore[arg-type]
            return stack.enter_context(begun)

        yield begin


def expected_logits(backbone: Backbone, table: ImageTable) -> torch.Tensor:
    transform = evaluation_transform(backbone.input_spec)
    images = torch.stack([transform(to_tensor(decode_image(table.path(row)))) for row in table.rows])
    with torch.no_grad():
        return backbone.module.eval()(images)


def test_features_and_the_weights_of_the_head_give_the_logits(
    trunk_pass: Begin, folder: Path, backbone: Backbone
) -> None:
    table = table_of(folder)
    found = trunk_pass(pooled_trunk(backbone)).features(table, LABELS, LoggingReporter())
    head = head_module(backbone.module)
    logits_NK = torch.from_numpy(found.features_ND) @ head.weight.detach().T + head.bias.detach()
    torch.testing.assert_close(logits_NK, expected_logits(backbone, table), rtol=1e-3, atol=1e-4)
    assert (found.features_ND.shape, found.features_ND.dtype) == ((20, 512), "float32")
    assert found.class_indices_N.tolist() == [LABELS.index(row.label) for row in table.rows]


def test_a_scan_that_is_looked_on_leaves_nothing_to_compute(
    trunk_pass: Begin, folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = trunk_pass(pooled_trunk(backbone))
    table = scan_images(list_images(folder), onlooker=asked).table
    monkeypatch.setattr(extract_module, "decode_image", pytest.fail)
    seen = asked.features(table, LABELS, LoggingReporter())
    assert asked.computed == 20
    monkeypatch.undo()
    monkeypatch.setenv("FINETUNE_CACHE", str(folder.parent / "other"))
    alone = trunk_pass(pooled_trunk(backbone)).features(table, LABELS, LoggingReporter())
    np.testing.assert_array_equal(seen.features_ND, alone.features_ND)


def test_a_second_pass_computes_nothing_and_reads_the_same_bits(
    trunk_pass: Begin, folder: Path, backbone: Backbone
) -> None:
    table = table_of(folder)
    first = trunk_pass(pooled_trunk(backbone)).features(table, LABELS, LoggingReporter())
    again = trunk_pass(pooled_trunk(backbone))
    np.testing.assert_array_equal(again.features(table, LABELS, LoggingReporter()).features_ND, first.features_ND)
    assert (again.computed, again.summary()["computed"]) == (0, 0)


def test_the_next_pass_computes_only_what_is_missing(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    table = table_of(folder)
    part = ImageTable(table.root, table.rows[:13])
    trunk_pass(pooled_trunk(backbone)).fill(part, LoggingReporter())
    rest = trunk_pass(pooled_trunk(backbone))
    rest.fill(table, LoggingReporter())
    assert rest.computed == 7


@pytest.mark.parametrize("repaid", [np.inf, 0.0])
def test_what_was_computed_before_a_kill_changes_no_bit_of_what_is_after(
    trunk_pass: Begin, folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, repaid: float
) -> None:
    monkeypatch.setattr(engine_module, "EXPORT_REPAID", repaid)
    table = table_of(folder)
    whole = trunk_pass(pooled_trunk(backbone))
    expected = whole.features(table, LABELS, LoggingReporter()).features_ND
    assert whole.engine.name == ("folded" if repaid else "ONNX Runtime")
    monkeypatch.setenv("FINETUNE_CACHE", str(folder.parent / "other"))
    trunk_pass(pooled_trunk(backbone)).fill(ImageTable(table.root, table.rows[:11]), LoggingReporter())
    found = trunk_pass(pooled_trunk(backbone)).features(table, LABELS, LoggingReporter()).features_ND
    np.testing.assert_array_equal(found, expected)


def _change_weights(backbone: Backbone, folder: Path) -> Backbone:
    with torch.no_grad():
        backbone.module.get_parameter("layer1.0.conv1.weight")[0, 0, 0, 0] += 1e-3
    return backbone


def _change_statistics(backbone: Backbone, folder: Path) -> Backbone:
    backbone.module.get_buffer("bn1.running_mean")[0] += 1e-3
    return backbone


def _change_preprocessing(backbone: Backbone, folder: Path) -> Backbone:
    return replace(backbone, input_spec=replace(backbone.input_spec, mean=(0.4, 0.5, 0.5)))


@pytest.mark.parametrize("change", [_change_weights, _change_statistics, _change_preprocessing])
def test_other_weights_or_preprocessing_miss(
    trunk_pass: Begin, folder: Path, backbone: Backbone, change: Callable[[Backbone, Path], Backbone]
) -> None:
    table = table_of(folder)
    trunk_pass(pooled_trunk(backbone)).fill(table, LoggingReporter())
    other = trunk_pass(pooled_trunk(change(backbone, folder)))
    other.fill(table, LoggingReporter())
    assert other.computed == 20


def test_another_head_does_not_miss(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    table = table_of(folder)
    trunk_pass(pooled_trunk(backbone)).fill(table, LoggingReporter())
    torch.nn.init.ones_(head_module(backbone.module).weight)
    other = trunk_pass(pooled_trunk(backbone))
    other.fill(table, LoggingReporter())
    assert other.computed == 0


def test_a_changed_image_misses_and_one_that_changed_after_the_scan_is_refused(
    trunk_pass: Begin, folder: Path, backbone: Backbone
) -> None:
    table = table_of(folder)
    trunk_pass(pooled_trunk(backbone)).fill(table, LoggingReporter())
    Image.new("RGB", (50, 50), "red").save(table.path(table.rows[0]))
    other = trunk_pass(pooled_trunk(backbone))
    other.fill(table_of(folder), LoggingReporter())
    assert other.computed == 1
    Image.new("RGB", (50, 50), "blue").save(table.path(table.rows[0]))
    stale = trunk_pass(pooled_trunk(backbone), view=View(augmentation="light", seed=0, number=0))
    with pytest.raises(DataError, match="has changed since it was looked at"):
        stale.fill(table, LoggingReporter())


def test_a_damaged_row_is_computed_again_and_never_used(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    table = table_of(folder)
    first = trunk_pass(pooled_trunk(backbone))
    expected = first.features(table, LABELS, LoggingReporter())
    first.cache.store.close()
    (rows,) = (folder.parent / "cache" / "activations").rglob("*.rows")
    data = bytearray(rows.read_bytes())
    data[1000] ^= 1
    rows.write_bytes(data)
    again = trunk_pass(pooled_trunk(backbone))
    found = again.features(table, LABELS, LoggingReporter())
    np.testing.assert_allclose(found.features_ND, expected.features_ND, rtol=1e-4, atol=1e-5)
    assert again.computed == 1


def test_copies_are_one_image(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    for name in ("copy1.png", "copy2.png"):
        (folder / "a" / name).write_bytes((folder / "a" / "00.png").read_bytes())
    asked = trunk_pass(pooled_trunk(backbone))
    table = scan_images(list_images(folder), onlooker=asked).table
    found = asked.features(table, LABELS, LoggingReporter())
    assert len(found) == 22
    assert asked.computed == 20


def test_a_disk_that_refuses_costs_the_cache_and_not_the_features(
    trunk_pass: Begin, folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(folder)
    expected = trunk_pass(pooled_trunk(backbone)).features(table, LABELS, LoggingReporter())
    (folder.parent / "blocked").write_text("a file where the cache folder should be")
    monkeypatch.setenv("FINETUNE_CACHE", str(folder.parent / "blocked"))
    found = trunk_pass(pooled_trunk(backbone)).features(table, LABELS, LoggingReporter())
    np.testing.assert_array_equal(found.features_ND, expected.features_ND)


def test_a_view_is_a_function_of_seed_number_and_image(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    table = table_of(folder)
    row = table.rows[3]
    image_HWC = decode_image(table.path(row))

    def prepared(seed: int, number: int) -> torch.Tensor:
        view = View(augmentation="light", seed=seed, number=number)
        asked = trunk_pass(pooled_trunk(backbone), view=view)
        tensor = asked.prepare(image_HWC, row.sha256)
        assert tensor is not None
        return tensor

    torch.manual_seed(5)
    first = prepared(0, 1)
    torch.manual_seed(6)
    assert torch.equal(prepared(0, 1), first)
    assert not torch.equal(prepared(0, 2), first)
    assert not torch.equal(prepared(1, 1), first)
    torch.manual_seed(View(augmentation="light", seed=0, number=1).seed_of(row.sha256))
    assert torch.equal(training_transform(backbone.input_spec, "light")(to_tensor(image_HWC)), first)


def test_views_and_boundaries_have_caches_of_their_own(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    table = table_of(folder)
    passes = [
        trunk_pass(pooled_trunk(backbone)),
        trunk_pass(pooled_trunk(backbone), view=View(augmentation="light", seed=0, number=0)),
        trunk_pass(boundary(backbone, 3)),
    ]
    for one in passes:
        one.fill(table, LoggingReporter())
    assert [one.computed for one in passes] == [20, 20, 20]


def test_maps_are_kept_in_half_precision(trunk_pass: Begin, folder: Path, backbone: Backbone) -> None:
    table = table_of(folder)
    trunk = boundary(backbone, 3)
    asked = trunk_pass(trunk)
    asked.fill(table, LoggingReporter())
    kept = asked.cache.get(table.rows[0].sha256)
    assert kept is not None
    transform = evaluation_transform(backbone.input_spec)
    (expected,) = trunk.module(transform(to_tensor(decode_image(table.path(table.rows[0]))))[None])
    assert kept[0].dtype == np.float16
    np.testing.assert_allclose(kept[0], expected[0].numpy(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("resnet18", "<f2"), ("timm/test_vit", "<f2"), ("squeezenet", "<f4"), ("lenet5", "<f4")],
)
def test_maps_of_networks_that_do_not_normalise_keep_their_precision(model: str, dtype: str) -> None:
    assert map_dtype(build_backbone(model, num_classes=2, use_pretrained=False).module) == dtype


def test_where_only_the_features_cross_the_pooled_cache_serves_the_boundary(backbone: Backbone) -> None:
    backbone.module.eval()
    assert boundary(backbone, len(backbone.stages) - 1).is_pooled
    squeezenet = build_backbone("squeezenet", num_classes=2, use_pretrained=False)
    squeezenet.module.eval()
    assert not boundary(squeezenet, len(squeezenet.stages) - 1).is_pooled


def test_numbers_that_float16_has_not_are_refused() -> None:
    cache = ActivationCache(None, dtype="<f2")
    with pytest.raises(ModelError, match=r"too large to be kept"):
        cache.put("0" * 64, (np.full((2, 2), 7e4, dtype=np.float32),))


def test_what_is_kept_in_memory_is_no_view_of_its_batch() -> None:
    cache = ActivationCache(None, dtype="<f4")
    batch_BND = np.ones((8, 197, 4), dtype=np.float32)
    cache.put("0" * 64, (batch_BND[3, 0],))
    kept = cache.get("0" * 64)
    assert kept is not None
    assert not np.shares_memory(kept[0], batch_BND)

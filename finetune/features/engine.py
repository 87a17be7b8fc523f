"""How a frozen trunk is computed: as it is, with its normalisation folded in, or by ONNX Runtime; chosen as it runs.

All three are the same function. Whichever is taken has been compared with the plain network on the first batch.
"""

import copy
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from finetune.runs.reporting import Reporter
from finetune.runs.row_store import RowStore

# Shapes: B batch, C channels, H height, W width.

Outputs = tuple[torch.Tensor, ...]
"""What a trunk gives for a batch, each (B, …) float32 on the CPU."""

BATCH_SIZE = 8
"""Images a CPU computes at once: more are no faster, and the memory that they are the first to touch takes time."""

DEVICE_BATCH_SIZE = 64
"""Images any other device computes at once."""

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

TOLERANCE = 1e-3
"""Relative difference from the plain network's outputs, in the 2-norm of an image, above which an engine is refused."""

EXPORT_REPAID_SECONDS = 2.0
"""Computing time left from which an export is tried: it takes half a second to one, and saves a tenth to a half."""


class TrunkEngine:
    """Computes a frozen trunk on batches, by the fastest means that agrees with it.

    On a CPU the first batch is computed twice, by the plain trunk and with every BatchNorm folded into the convolution
    before it (Jacob 2018, arXiv 1712.05877, section 3.2). When enough images are still to come the trunk is exported
    to ONNX, and ONNX Runtime takes over if it is faster; `exports` keeps the file for later runs. Elsewhere the plain
    trunk runs, in the number format that `precision` names.

    Args:
        trunk: In eval mode; images (B, C, H, W) float32 to a tensor or a tuple of tensors (B, …).
        device: Where `trunk` is.
        images: How many images will probably be computed.
        exports: Holds the exported trunk under `export_key`.
        export_key: Names the trunk's weights and input.
        reporter: Told when an engine disagrees with the plain trunk.
        precision: What a GPU computes in: "fp32", "bf16" or "fp16".

    It wants `batch_size` images at a time, and takes fewer.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        device: torch.device,
        images: int,
        exports: RowStore | None,
        export_key: str,
        reporter: Reporter,
        precision: str = "fp32",
    ) -> None:
        self.trunk = trunk
        self.device = device
        self.images = images
        self.exports = exports
        self.export_key = export_key
        self.reporter = reporter
        self.half_type = HALF_TYPES.get(precision) if device.type != "cpu" else None
        self.batch_size = BATCH_SIZE if device.type == "cpu" else DEVICE_BATCH_SIZE
        self.name = "plain"
        self._network = trunk
        self._compute: Callable[[torch.Tensor], Outputs] = self._plain
        self._reference: tuple[torch.Tensor, Outputs] | None = None
        self._may_choose = device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()
        self._may_export = self._may_choose and exports is not None
        self._seconds_per_image = 0.0

    def __call__(self, images_BCHW: torch.Tensor) -> Outputs:
        """Compute the trunk on normalised images (B, C, H, W) float32."""
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            if self._reference is None:
                outputs = self._first_batch(images_BCHW)
            else:
                started = time.perf_counter()
                outputs = self._compute(images_BCHW)
                self._seconds_per_image = (time.perf_counter() - started) / len(images_BCHW)
            self.images -= len(images_BCHW)
            if self._may_export and self.images * self._seconds_per_image > EXPORT_REPAID_SECONDS:
                self._may_export = False
                self._try_onnx()
        return outputs

    def _first_batch(self, images_BCHW: torch.Tensor) -> Outputs:
        expected = self._plain(images_BCHW)
        self._reference = images_BCHW, expected
        if self._may_choose:
            folded = fold_batch_norm(self.trunk, images_BCHW[:1])
            if self._adopt("folded", lambda images: _as_outputs(folded(images))):
                self._network = folded
        return expected

    def _plain(self, images_BCHW: torch.Tensor) -> Outputs:
        with torch.autocast(self.device.type, self.half_type, enabled=self.half_type is not None):
            return _as_outputs(self.trunk(images_BCHW.to(self.device, non_blocking=True)))

    def _adopt(self, name: str, compute: Callable[[torch.Tensor], Outputs]) -> bool:
        """Compute by `compute` from now on, if it agrees with the plain trunk on the first batch."""
        assert self._reference is not None
        images_BCHW, expected = self._reference
        try:
            does_agree = agree(expected, compute(images_BCHW))
        except Exception:  # whatever an engine meets in a network it does not know, the network itself still computes
            does_agree = False
        if not does_agree:
            self.reporter.warn(f"The frozen layers computed otherwise ({name}) give other features; that is not used.")
            return False
        self.name, self._compute = name, compute
        return True

    def _try_onnx(self) -> None:
        """Hand over to ONNX Runtime if it can have the trunk, agrees and is faster."""
        assert self._reference is not None
        assert self.exports is not None
        images_BCHW = self._reference[0]
        model = self.exports.get(self.export_key)
        if model is None:
            exported = export_onnx(self._network, images_BCHW.new_zeros(self.batch_size, *images_BCHW.shape[1:]))
            if exported is None:
                return
            self.exports.put(self.export_key, exported)
            model = memoryview(exported)
        compute = onnx_runtime(bytes(model))
        if compute is None:
            return
        before = self.name, self._compute
        if self._adopt("ONNX Runtime", compute):
            started = time.perf_counter()
            compute(images_BCHW)
            if time.perf_counter() - started > self._seconds_per_image * len(images_BCHW):
                self.name, self._compute = before


def agree(expected: Outputs, found: Outputs) -> bool:
    """Whether `found` is `expected` to within TOLERANCE, image by image, the largest value at the same place.

    Values that tie to within the tolerance count as one place.
    """
    if len(expected) != len(found):
        return False
    for expected_B, found_B in zip(expected, found, strict=True):
        if expected_B.shape != found_B.shape or not bool(torch.isfinite(found_B).all()):
            return False
        expected_BD, found_BD = expected_B.flatten(1), found_B.flatten(1)
        size_B = expected_BD.norm(dim=1)
        if bool(((expected_BD - found_BD).norm(dim=1) > TOLERANCE * size_B).any()):
            return False
        top_B = expected_BD.amax(dim=1)
        at_found_top_B = expected_BD.gather(1, found_BD.argmax(dim=1, keepdim=True))[:, 0]
        if bool((top_B - at_found_top_B > TOLERANCE * top_B.abs()).any()):
            return False
    return True


def fold_batch_norm(trunk: nn.Module, image_1CHW: torch.Tensor) -> nn.Module:
    """Return a copy of `trunk` with every BatchNorm that follows a convolution folded into its weights.

    One without statistics of its own stays as it is.

    Which follows which is seen by running one image through. A convolution whose output something else also reads
    would be missed by that; comparing the outputs finds it.
    """
    folded = copy.deepcopy(trunk)
    made_by: dict[int, tuple[nn.Module, torch.Tensor]] = {}  # holds the tensors, so that no id is given twice
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def after_convolution(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        made_by[id(output)] = module, output

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if id(inputs[0]) in made_by and module.running_mean is not None:
            pairs.append((made_by[id(inputs[0])][0], module))

    handles = [
        *(m.register_forward_hook(after_convolution) for m in folded.modules() if isinstance(m, nn.Conv2d)),
        *(m.register_forward_pre_hook(before_norm) for m in folded.modules() if isinstance(m, _BatchNorm)),
    ]
    with torch.no_grad():
        folded(image_1CHW)
    for handle in handles:
        handle.remove()
    paths = {id(module): path for path, module in folded.named_modules()}
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(convolution, norm)  # type: ignore[arg-type, type-var]
        folded.set_submodule(paths[id(convolution)], fused)
        # timm's norms bring dropout and activation along.
        rest = nn.Sequential(*(getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)))
        folded.set_submodule(paths[id(norm)], rest)
    return folded.to(memory_format=torch.channels_last)


def export_onnx(trunk: nn.Module, images_BCHW: torch.Tensor) -> bytes | None:
    """Export `trunk` for batches of the shape of `images_BCHW`, or return None if it cannot be.

    By tracing, which takes a third of the time of torch's newer exporter, and for one batch size, which lets all
    arithmetic on shapes be folded away: with an open size ONNX Runtime loses a quarter of its speed on EfficientNets.
    """
    file = io.BytesIO()
    try:
        with _quiet_exporter(), torch.inference_mode(mode=False), torch.no_grad():
            torch.onnx.export(trunk, (images_BCHW.clone(),), file, dynamo=False, input_names=["images"])  # type: ignore[arg-type]
    except Exception:  # whatever an exporter meets in a network it does not know, the network itself still computes
        return None
    return file.getvalue()


def onnx_runtime(model: bytes) -> Callable[[torch.Tensor], Outputs] | None:
    """Return what computes an exported trunk, or None if ONNX Runtime cannot.

    Batches smaller than the one it was exported for are filled up.
    """
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores alone
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:  # it has a class of error for every reason, and here all mean the same
        return None
    source = session.get_inputs()[0]

    def compute(images_BCHW: torch.Tensor) -> Outputs:
        whole_BCHW = np.zeros(source.shape, dtype=np.float32)
        whole_BCHW[: len(images_BCHW)] = images_BCHW.numpy()
        outputs = session.run(None, {source.name: whole_BCHW})
        return tuple(torch.from_numpy(output[: len(images_BCHW)]) for output in outputs)

    return compute


def _as_outputs(outputs: torch.Tensor | Outputs) -> Outputs:
    several = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return tuple(output.float().cpu() for output in several)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the tracer's warnings, all about what may change from batch to batch, from people: nothing changes here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

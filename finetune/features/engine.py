"""How a frozen trunk is computed: as it is, with its normalisation folded in, or by ONNX Runtime.

All three are the same function. Whichever is taken has been compared with the plain network on the first batch.
"""

import copy
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from finetune.features.trunk import Trunk
from finetune.runs.reporting import Reporter
from finetune.runs.row_store import RowStore

# Shapes: B batch, C channels, H height, W width.

Outputs = tuple[torch.Tensor, ...]
"""What a trunk gives for a batch, each (B, …) float32 on the CPU."""

BATCH_SIZE = 8
"""Images a CPU computes at once: more are no faster, and the memory that they are the first to touch takes time."""

DEVICE_BATCH_SIZE = 64
"""Images any other device computes at once."""

STDOUT = 1  # its file descriptor

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

TOLERANCE = 1e-3
"""Relative difference from the plain network's outputs, in the 2-norm of an image, above which an engine is refused."""

Kind = Literal["plain", "folded", "ONNX Runtime"]

EXPORT_REPAID = 100e9
"""Multiply-adds of all images from which an export is tried: on two cores two seconds' worth, of which it saves a tenth
to a half and costs half a second to one."""


def choose_kind(trunk: Trunk, *, images: int, device: torch.device) -> Kind:
    """Return how `trunk` is to be computed on so many images: by what they are, and not by the clock.

    So with as many threads the features of a run are the same bits wherever they are computed anew: after a kill, or
    after the cache was cleared. A GPU runs the network as it is, and so does the deterministic mode.
    """
    if device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
        return "plain"
    return "ONNX Runtime" if images * trunk.multiply_adds > EXPORT_REPAID else "folded"


class TrunkEngine:
    """Computes a frozen trunk on batches, in the way of its `kind` if that agrees with the plain trunk.

    On a CPU the first batch is computed by the plain trunk too, and compared: with every BatchNorm folded into the
    convolution before it (Jacob 2018, arXiv 1712.05877, section 3.2), and, where it is to be, exported to ONNX and
    computed by ONNX Runtime; `exports` keeps the file for later runs. A batch that is not full is filled up, so that
    what an image gives does not depend on the others.

    Args:
        trunk: In eval mode; images (B, C, H, W) float32 to a tensor or a tuple of tensors (B, …).
        device: Where `trunk` is.
        kind: How it is computed, as from `choose_kind`.
        exports: Holds the exported trunk under `export_key`.
        export_key: Names the trunk's weights and input.
        reporter: Told when an engine disagrees with the plain trunk.
        precision: What a GPU computes in: "fp32", "bf16" or "fp16".

    It wants `batch_size` images at a time, and takes fewer. `name` is the kind that it has become.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        device: torch.device,
        kind: Kind,
        exports: RowStore | None,
        export_key: str,
        reporter: Reporter,
        precision: str = "fp32",
    ) -> None:
        self.trunk = trunk
        self.device = device
        self.kind = kind
        self.exports = exports
        self.export_key = export_key
        self.reporter = reporter
        self.half_type = HALF_TYPES.get(precision) if device.type != "cpu" else None
        self.batch_size = BATCH_SIZE if device.type == "cpu" else DEVICE_BATCH_SIZE
        self.name: Kind = "plain"
        self._compute: Callable[[torch.Tensor], Outputs] = self._plain
        self._has_begun = False

    def __call__(self, images_BCHW: torch.Tensor) -> Outputs:
        """Compute the trunk on normalised images (B, C, H, W) float32."""
        count = len(images_BCHW)
        filler = images_BCHW.new_zeros(self.batch_size - count, *images_BCHW.shape[1:])
        whole_BCHW = torch.cat([images_BCHW, filler]).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            outputs = self._compute(whole_BCHW) if self._has_begun else self._first_batch(whole_BCHW, count)
        self._has_begun = True
        return tuple(output[:count] for output in outputs)

    def _first_batch(self, images_BCHW: torch.Tensor, count: int) -> Outputs:
        """Compute a batch in every way up to that of `kind`, and go on in the last that agrees with the plain one.

        The first `count` images of it are compared.
        """
        outputs = self._plain(images_BCHW)
        expected = tuple(output[:count] for output in outputs)
        network = self.trunk
        if self.kind != "plain":
            folded = fold_batch_norm(self.trunk, images_BCHW[:1])
            if found := self._adopt("folded", lambda images: _as_outputs(folded(images)), images_BCHW, expected):
                outputs, network = found, folded
        if self.kind == "ONNX Runtime" and (compute := self._onnx(network, images_BCHW)):
            outputs = self._adopt("ONNX Runtime", compute, images_BCHW, expected) or outputs
        return outputs

    def _plain(self, images_BCHW: torch.Tensor) -> Outputs:
        with torch.autocast(self.device.type, self.half_type, enabled=self.half_type is not None):
            return _as_outputs(self.trunk(images_BCHW.to(self.device, non_blocking=True)))

    def _adopt(
        self, name: Kind, compute: Callable[[torch.Tensor], Outputs], images_BCHW: torch.Tensor, expected: Outputs
    ) -> Outputs | None:
        """Go on by `compute` if it gives for a batch what is `expected`, and return what it gives then."""
        try:
            outputs = compute(images_BCHW)
            does_agree = agree(
                expected, tuple(output[: len(known)] for output, known in zip(outputs, expected, strict=True))
            )
        except Exception:  # whatever an engine meets in a network it does not know, the network itself still computes
            does_agree = False
        if not does_agree:
            self.reporter.warn(f"The frozen layers computed otherwise ({name}) give other features; that is not used.")
            return None
        self.name, self._compute = name, compute
        return outputs

    def _onnx(self, network: nn.Module, images_BCHW: torch.Tensor) -> Callable[[torch.Tensor], Outputs] | None:
        """Return what computes `network` by ONNX Runtime, if it can have it."""
        model = self.exports.get(self.export_key) if self.exports else None
        if model is None:
            exported = export_onnx(network, images_BCHW.new_zeros(self.batch_size, *images_BCHW.shape[1:]))
            if exported is None:
                return None
            if self.exports:
                self.exports.put(self.export_key, exported)
            model = memoryview(exported)
        return onnx_runtime(bytes(model))


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
    """Return what computes an exported trunk, on batches of the size it was exported for, or None."""
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
        outputs = session.run(None, {source.name: images_BCHW.contiguous().numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)

    return compute


def _as_outputs(outputs: torch.Tensor | Outputs) -> Outputs:
    several = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return tuple(output.float().cpu() for output in several)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep what the tracer says from people: warnings of what may change from batch to batch, where nothing does here.

    Of a network that it cannot export it writes the whole graph, past Python, on standard output.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _silent_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _silent_output() -> Iterator[None]:
    """Let what is written on standard output go nowhere, by C too; where it is closed it does anyway."""
    try:
        kept = os.dup(STDOUT)
    except OSError:
        yield
        return
    if sys.stdout:
        sys.stdout.flush()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, STDOUT)
            os.close(kept)

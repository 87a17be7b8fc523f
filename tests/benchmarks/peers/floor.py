"""The floor of this machine for a feature pass: decoding alone, the network alone, and the rate of matrix products.

    python floor.py DATA --weights FILE [--seconds 2]

Both are given all processors, which a feature pass must share between them: its floor is one image decoded and then one
computed, 1 / (1 / decode + 1 / forward). A way to decode is a line in DECODERS, an engine a line in ENGINES.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from contestant import backbone
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from finetune.data.decode import decode_image
from finetune.data.transforms import evaluation_transform
from finetune.models.catalog import DEFAULT_MODEL, input_spec, resolve

# Shapes: B batch, C channels, H height, W width.

CORES = os.cpu_count() or 1
BATCHES = (1, 8, 32)
DECODED_IMAGES = 400
PRODUCT_SIDE = 2_048
SPEC = input_spec(resolve(DEFAULT_MODEL))
PREPROCESS = evaluation_transform(SPEC)

Engine = Callable[[np.ndarray[Any, Any]], object]
"""Takes images (B, C, H, W) float32, and runs them through the network."""


def decode(path: Path, *, short_side_px: int | None = None) -> torch.Tensor:
    """Decode, resize, crop and normalise as finetune does."""
    pixels_HWC = decode_image(path, short_side_px=short_side_px)
    return torch.as_tensor(PREPROCESS(torch.from_numpy(pixels_HWC).permute(2, 0, 1)))


DECODERS: dict[str, Callable[[Path], torch.Tensor]] = {
    "at full size": decode,
    "JPEG reduced": partial(decode, short_side_px=SPEC.resize_px),
}


def eager(model: nn.Module, images_BCHW: np.ndarray[Any, Any], _: Path) -> Engine:
    """PyTorch itself, BatchNorm folded into the convolutions, channels last."""
    folded = fold(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(images_BCHW: np.ndarray[Any, Any]) -> object:
        with torch.inference_mode():
            return folded(torch.from_numpy(images_BCHW).contiguous(memory_format=torch.channels_last))

    return run


def onnx_runtime(model: nn.Module, images_BCHW: np.ndarray[Any, Any], scratch: Path) -> Engine:
    """ONNX Runtime on a network of fixed batch size, which lets it fold all that depends on shapes."""
    import onnxruntime

    path = export(model, images_BCHW, scratch)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images_BCHW: session.run(None, {"images": images_BCHW})


def openvino(model: nn.Module, images_BCHW: np.ndarray[Any, Any], scratch: Path) -> Engine:
    """OpenVINO in single precision."""
    import openvino

    path = export(model, images_BCHW, scratch)
    return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # type: ignore[no-any-return]


ENGINES = {"torch": eager, "onnxruntime": onnx_runtime, "openvino": openvino}


def fold(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm of timm's EfficientNet into the convolution before it, in place; its activation stays."""
    for parent in list(model.modules()):
        layers = list(parent.named_children())
        for (name, layer), (norm_name, norm) in pairwise(layers):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, norm_name, norm.act)
    return model


def export(model: nn.Module, images_BCHW: np.ndarray[Any, Any], scratch: Path) -> Path:
    """Write the network with folded BatchNorm as ONNX for batches like these."""
    path = scratch / f"{len(images_BCHW)}.onnx"
    if path.exists():
        return path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter that needs no further package
        torch.onnx.export(
            fold(model), (torch.from_numpy(images_BCHW),), str(path), input_names=["images"], dynamo=False
        )
    return path


def rate(work: Callable[[], object], amount: float, *, seconds: float) -> float:
    """Return `amount` over the median time of a call, of at least five and as many as fit into `seconds`."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return amount / statistics.median(times)


def decode_rates(folder: Path) -> dict[str, float]:
    """Return images a second of each decoder, as many threads as processors, one image a thread."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = paths[:: max(1, len(paths) // DECODED_IMAGES)]
    rates = {}
    torch.set_num_threads(1)
    for name, decoder in DECODERS.items():
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(decoder, paths[:16]))
            start = time.perf_counter()
            for _ in pool.map(decoder, paths):
                pass
            rates[name] = len(paths) / (time.perf_counter() - start)
    torch.set_num_threads(CORES)
    return rates


def forward_rates(weights: Path, *, seconds: float) -> dict[str, float]:
    """Return images a second of each engine that is installed, at the batch size that suits it best."""
    side = SPEC.image_size_px
    rates = {}
    with TemporaryDirectory() as scratch:
        for name, build in ENGINES.items():
            if importlib.util.find_spec(name) is None:
                continue
            for batch in BATCHES:
                images_BCHW = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
                run = build(backbone(weights).eval(), images_BCHW, Path(scratch))
                found = rate(lambda run=run, images_BCHW=images_BCHW: run(images_BCHW), batch, seconds=seconds)
                rates[name] = max(found, rates.get(name, 0.0))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a feature pass could reach at best on this machine.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    matrix = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE)
    operations = 2e-9 * PRODUCT_SIDE**3
    decoders = decode_rates(options.data)
    engines = forward_rates(options.weights, seconds=options.seconds)
    result = {
        "gigaflops": rate(lambda: matrix @ matrix, operations, seconds=options.seconds),
        "decode": decoders,
        "forward": engines,
        "images_per_second": 1 / (1 / max(decoders.values()) + 1 / max(engines.values())),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

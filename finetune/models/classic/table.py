"""The list of the classic networks: the one door through which the catalog sees this folder."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from finetune.models.classic.alexnet import alexnet2012
from finetune.models.classic.lenet5 import lenet5, lenet5_1998, lenet5_relu, lenet5_sigmoid
from finetune.models.classic.mlp import mlp
from finetune.models.classic.pixels import pixels
from finetune.models.classic.small_cnn import small_cnn
from finetune.models.classic.vgg import vgg16_2014, vgg16_cifar, vgg16_cifar_2048
from finetune.runs.records import InputSpec


@dataclass(frozen=True, kw_only=True)
class Classic:
    """One classic network: how it is built, what it expects of an image, where it was published.

    `build` takes the number of classes and, by keyword, the `channels` of the image; it draws the starting weights from
    torch's default generator. `input_spec` has the network's own number of channels: 1 for grey images, 3 for colour.
    """

    build: Callable[..., nn.Module]
    input_spec: InputSpec
    paper: str
    year: int
    classes: int = 10
    """Outputs of the published network."""


# A black pixel becomes -0.1 and a white one 1.175, so that a digit's mean is about 0 and its variance about 1: section
# II B of the paper. The paper lays its 28 px digits on a 32 px field; resizing makes them a seventh larger instead.
_LENET = InputSpec(image_size_px=32, resize_px=32, interpolation="bilinear", mean=(0.1 / 1.275,), std=(1 / 1.275,))
_MNIST = InputSpec(image_size_px=28, resize_px=28, interpolation="bilinear", mean=(0.1307,), std=(0.3081,))
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR = InputSpec(
    image_size_px=32,
    resize_px=32,
    interpolation="bilinear",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_PIXELS = InputSpec(image_size_px=32, resize_px=32, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)

_LECUN_1998 = "LeCun et al. 1998, Gradient-based learning applied to document recognition"
_SIMONYAN_2014 = "Simonyan and Zisserman 2014, Very deep convolutional networks for large-scale image recognition"
_WITH_BATCH_NORM = f"{_SIMONYAN_2014}; with the batch normalisation of Ioffe and Szegedy 2015"

CLASSICS: dict[str, Classic] = {
    "lenet5": Classic(build=lenet5, input_spec=_LENET, paper=f"{_LECUN_1998}; with ReLU and max pooling", year=1998),
    "lenet5_1998": Classic(build=lenet5_1998, input_spec=_LENET, paper=_LECUN_1998, year=1998),
    "lenet5_relu": Classic(
        build=lenet5_relu,
        input_spec=_MNIST,
        paper=f"{_LECUN_1998}; with ReLU and the starting weights of He et al. 2015",
        year=2015,
    ),
    "lenet5_sigmoid": Classic(
        build=lenet5_sigmoid,
        input_spec=_MNIST,
        paper="Zhang et al. 2019, Dive into deep learning",
        year=2019,
    ),
    "alexnet2012": Classic(
        build=alexnet2012,
        # The paper subtracts a mean image and divides by nothing; these are ImageNet's usual numbers.
        input_spec=InputSpec(
            image_size_px=227, resize_px=256, interpolation="bilinear", mean=_IMAGENET_MEAN, std=_IMAGENET_STD
        ),
        paper="Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks",
        year=2012,
        classes=1000,
    ),
    "vgg16_2014": Classic(
        build=vgg16_2014,
        input_spec=InputSpec(
            image_size_px=224, resize_px=256, interpolation="bilinear", mean=_IMAGENET_MEAN, std=_IMAGENET_STD
        ),
        paper=_SIMONYAN_2014,
        year=2014,
        classes=1000,
    ),
    "vgg16_cifar": Classic(build=vgg16_cifar, input_spec=_CIFAR, paper=_WITH_BATCH_NORM, year=2015),
    "vgg16_cifar_2048": Classic(build=vgg16_cifar_2048, input_spec=_CIFAR, paper=_WITH_BATCH_NORM, year=2015),
    "small_cnn": Classic(build=small_cnn, input_spec=_MNIST, paper="Morvan Zhou 2017, PyTorch tutorial 401", year=2017),
    "mlp": Classic(build=mlp, input_spec=_MNIST, paper=f"{_LECUN_1998}, figure 9", year=1998),
    "linear": Classic(
        build=pixels,
        input_spec=_PIXELS,
        paper="Cox 1958, The regression analysis of binary sequences",
        year=1958,
    ),
    "knn": Classic(
        build=pixels,
        input_spec=_PIXELS,
        paper="Cover and Hart 1967, Nearest neighbor pattern classification",
        year=1967,
    ),
}
"""The classic networks by name. "knn" is the network of "linear", whose output layer gives way to stored neighbours."""

"""(e) vyntri: analytic projection and ridge regression on frozen features, on the backbone of all others.

Its registry has no such network, so the entry of one it has is given another factory, and its data sets the
preprocessing that the weights want.
"""

import dataclasses

from contestant import Stopwatch, arguments, backbone, preprocessing, print_result
from vyntri import Vyntri
from vyntri.backbones import registry
from vyntri.data.dataset import FolderDataset

BORROWED = "resnet18"


def main() -> None:
    options = arguments()
    network = backbone(options.weights).eval()
    registry._BACKBONES[BORROWED] = dataclasses.replace(
        registry._BACKBONES[BORROWED],
        feature_dim=network.num_features,
        pretrained_id="tf_efficientnet_lite0",
        factory=lambda: network,
    )
    sets = []
    for split in ("train", "valid"):
        images = FolderDataset(str(options.data / split))
        images.transform = preprocessing(network)
        sets.append(images)
    model = Vyntri(
        backbone=BORROWED, cache_dir=str(options.scratch / "cache"), num_workers=options.workers, seed=options.seed
    )
    watch = Stopwatch()
    model.fit(train=sets[0])
    seconds = watch.seconds()
    watch = Stopwatch()
    accuracy = float(model.evaluate(sets[1]).accuracy)
    print_result(
        accuracy=accuracy,
        images_per_second=len(sets[0]) / seconds,
        fit_seconds=seconds,
        evaluate_seconds=watch.seconds(),
    )


if __name__ == "__main__":
    main()

"""(c) fastai: `vision_learner(…).fine_tune(5)`, one epoch with a frozen body and five of all layers."""

import statistics
import time

import torch
from contestant import BATCH, arguments, print_result
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    ProgressCallback,
    Resize,
    accuracy,
    aug_transforms,
    set_seed,
    vision_learner,
)

EPOCHS = 5


class TrainingRate(Callback):
    """Keeps the images a second of each training epoch."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def before_train(self) -> None:
        self.start = time.perf_counter()

    def after_train(self) -> None:
        self.rates.append(len(self.dls.train_ds) / (time.perf_counter() - self.start))


def main() -> None:
    options = arguments()
    set_seed(options.seed)
    loaders = ImageDataLoaders.from_folder(
        options.data,
        valid="valid",
        item_tfms=Resize(256),
        batch_tfms=aug_transforms(size=224),
        bs=BATCH,
        num_workers=options.workers,
        device=torch.device("cpu"),
    )
    rate = TrainingRate()
    learner = vision_learner(
        loaders,
        "tf_efficientnet_lite0",
        metrics=accuracy,
        pretrained_cfg_overlay={"file": str(options.weights)},
        path=options.scratch,
        cbs=rate,
    )
    learner.remove_cb(ProgressCallback)
    learner.fine_tune(options.epochs or EPOCHS)
    print_result(
        accuracy=float(learner.validate()[1]),
        images_per_second=statistics.median(rate.rates),
        frozen_images_per_second=rate.rates[0],
        epochs=len(rate.rates),
    )


if __name__ == "__main__":
    main()

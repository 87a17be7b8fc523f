"""(b) timm embeds every image once, scikit-learn's LogisticRegression is fitted to the standardised embeddings."""

import torch
from contestant import BATCH, Stopwatch, arguments, backbone, preprocessing, print_result
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


@torch.inference_mode()
def embed(model, images: ImageFolder, *, workers: int):
    batches = [
        (model(images_BCHW), targets_B) for images_BCHW, targets_B in DataLoader(images, BATCH, num_workers=workers)
    ]
    features, targets = zip(*batches, strict=True)
    return torch.cat(features).numpy(), torch.cat(targets).numpy()


def main() -> None:
    options = arguments()
    model = backbone(options.weights).eval()
    sets = [ImageFolder(options.data / split, preprocessing(model)) for split in ("train", "valid")]
    watch = Stopwatch()
    train, valid = (embed(model, images, workers=options.workers) for images in sets)
    seconds = watch.seconds()
    watch = Stopwatch()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000)).fit(*train)
    print_result(
        accuracy=classifier.score(*valid),
        images_per_second=sum(map(len, sets)) / seconds,
        embed_seconds=seconds,
        fit_seconds=watch.seconds(),
    )


if __name__ == "__main__":
    main()

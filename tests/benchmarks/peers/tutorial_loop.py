"""(a) The loop of the tutorials: frozen body, augmented images, 25 epochs of Adam on the head, best on validation kept.

Its training images are cut out of the picture at its own size, and its validation images resized first, as the
tutorials have it; "frozen" sets `requires_grad` alone, so the statistics of BatchNorm go on moving.
"""

import copy
import statistics

import torch
from contestant import Stopwatch, arguments, backbone, preprocessing, print_result
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

BATCH = 8
EPOCHS = 25


def training_transform(mean, std):
    return transforms.Compose([
        transforms.RandomRotation(45),
        transforms.CenterCrop(224),
        transforms.RandomHorizontalFlip(),
        transforms.RandomVerticalFlip(),
        transforms.ColorJitter(brightness=0.2, contrast=0.1, saturation=0.1, hue=0.1),
        transforms.RandomGrayscale(0.025),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ])  # fmt: skip


def train_epoch(model, loader, optimizer) -> None:
    model.train()
    for images_BCHW, targets_B in loader:
        optimizer.zero_grad()
        nn.functional.nll_loss(model(images_BCHW), targets_B).backward()
        optimizer.step()


@torch.no_grad()
def accuracy_of(model, loader) -> float:
    model.eval()
    hits = sum((model(images_BCHW).argmax(1) == targets_B).sum().item() for images_BCHW, targets_B in loader)
    return hits / len(loader.dataset)


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    model = backbone(options.weights, classes=1000)
    config = model.pretrained_cfg
    train = ImageFolder(options.data / "train", training_transform(config["mean"], config["std"]))
    valid = ImageFolder(options.data / "valid", preprocessing(model))
    loaders = [DataLoader(images, BATCH, shuffle=True, num_workers=options.workers) for images in (train, valid)]
    model.requires_grad_(False)
    model.classifier = nn.Sequential(nn.Linear(model.num_features, len(train.classes)), nn.LogSoftmax(dim=1))
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best, kept = -1.0, {}
    accuracies, rates = [], []
    for _ in range(options.epochs or EPOCHS):
        watch = Stopwatch()
        train_epoch(model, loaders[0], optimizer)
        rates.append(len(train) / watch.seconds())
        accuracies.append(accuracy_of(model, loaders[1]))
        scheduler.step()
        if accuracies[-1] > best:
            best, kept = accuracies[-1], copy.deepcopy(model.state_dict())
            checkpoint = {"state_dict": kept, "best_accuracy": best, "optimizer": optimizer.state_dict()}
            torch.save(checkpoint, options.scratch / "checkpoint.pt")
    model.load_state_dict(kept)
    print_result(
        accuracy=best, last_epoch=accuracies[-1], images_per_second=statistics.median(rates), epochs=len(accuracies)
    )


if __name__ == "__main__":
    main()

"""Every option of a training run on one page; the flags, the YAML and the Python arguments derive from it."""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import tyro

from finetune.config.durations import parse_seconds
from finetune.config.phases import parse_phases
from finetune.errors import ConfigError, first_ten, nearest

Auto = Literal["auto"]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Whatever is "auto" is resolved from the data and the machine, once, before training."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]] = ""
    """Folder or CSV of labelled images: DATA/{train,valid,test}/CLASS/*, DATA/CLASS/*, DATA/train-000000.tar … (shards
    of WebDataset) or image_path,label[,split]."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Run folder to write; by default runs/<data>-<model>, then -2, -3 …"""
    overwrite: bool = False
    """Empty a run folder that is there already."""
    resume: bool = False
    """Go on from the last checkpoint of the run folder. With more --epochs than before, also of a training that has
    ended: from here on its rates are those that the longer schedule has at this step."""
    seed: int = 0
    """Seed of the split, the order of the images, the augmentation and the new head; 0 or more."""

    label_names: OptionalFile = None
    """JSON that maps folder names to the names shown; by default cat_to_name.json in DATA or beside it."""
    valid_fraction: float = 0.2
    """Share of the images set aside for validation where DATA has no such split; between 0 and 0.5."""
    folds: int = 0
    """Cross-validate: train this many times, each time with another part of the images held back to be scored, and
    then once on all of them. The last epoch is kept; of a solved head, only if the folds are better for fine-tuning.
    DATA's own train and valid are one then. 0 does not."""
    allow_bad_images: bool = False
    """Train although more than 1 % of the training images, or any validation image, cannot be read."""

    model: str = "efficientnet_lite0"
    """Name of the network, see `finetune models`. The default carries its ImageNet weights: nothing is downloaded."""
    use_pretrained: bool = True
    """Start from the model zoo's weights."""
    weights: OptionalFile = None
    """Start from this weight file instead: safetensors, or a PyTorch state dict."""
    head: Literal["logits", "log_softmax", "knn"] = "logits"
    """Output of the new head: logits, or log_softmax, trained with the negative log-likelihood. knn is no layer: the
    training images whose features are nearest vote, and nothing is trained, whatever --epochs says."""
    image_size: int | Auto = "auto"
    """Side of the square that the network sees, in pixels; auto takes the size the weights were trained at, or with
    --budget a smaller one where there is no time for that."""
    channels: Literal[1, 3] | Auto = "auto"
    """What the network sees of an image: 1 grey, 3 colour. Only the classic networks have the choice; auto takes the
    network's own, see `finetune inspect`."""
    shuffle_pixels: bool = False
    """Put the pixels of every image into one fixed random order: shows how much a network lives on neighbourhood."""

    scenario: Literal["auto", "small-similar", "large-similar", "small-different", "large-different"] = "auto"
    """What learns: the head only (small-similar), the head and the upper body (small-different), all from the
    pretrained start (large-similar), all from a fresh start (large-different); auto measures which one fits."""
    feature_extract: bool = False
    """Use the pretrained body as a fixed extractor and fit the head alone; the same as scenario small-similar."""
    head_start: Literal["probe", "random"] = "probe"
    """Start from the head solved on the frozen features (Kumar 2022, arXiv 2202.10054), or from a random one."""

    head_stages: Literal["auto", "last", "all"] = "auto"
    """What the solved head looks at: the features of the last stage, or the pooled outputs of all stages (Evci 2022,
    arXiv 2201.03529). auto takes what does better in a cross-validation, of fewer than 20,000 images."""

    boundary_cache: Literal["auto", "always", "never"] = "auto"
    """Whether layers that stay frozen run once, and the others learn from what they gave: auto measures what is
    cheaper. The augmentation is then that of the --views."""
    views: int | Auto = "auto"
    """Augmented views of each training image that the frozen layers run on, taken in turn by the epochs; 0 is the image
    as it is. auto: 0 where only the head learns, else 4."""

    augmentation: Literal["none", "light", "flowers", "trivial", "affine", "crop-flip", "alexnet"] = "light"
    """Random changes of the training images: light crops and flips; flowers also rotates and changes colours; trivial
    is light with TrivialAugment (Müller 2021, arXiv 2103.10158); affine turns and shifts a little and never mirrors;
    crop-flip is for tiny images; alexnet crops, flips and changes the light (Krizhevsky 2012). With 5 images a class or
    fewer, the solved head learns from 4 views by light or affine as well."""
    random_erasing: float = 0.0
    """Share of the training images of which a random rectangle is made grey (Zhong 2017, arXiv 1708.04896); 0 to 1."""
    mixup: float = 0.0
    """Blend every training image with another; the alpha of mixup (Zhang 2018, arXiv 1710.09412), 0.1 to 0.4 where
    there are many images; 0 does not."""
    cutmix: float = 0.0
    """Put a piece of another training image into every one; the alpha of CutMix (Yun 2019, arXiv 1905.04899), usually
    1; 0 does not. With --mixup either comes at random."""
    phases: Annotated[str, tyro.conf.arg(metavar="PHASES")] = ""
    """Train in phases, each from the best weights so far: "head:5,all:10:0.1" is 5 epochs of the head, then 10 of all
    layers at a tenth of the rates; top2 stands for the head and two stages below it, gradual:2 frees one stage more
    every 2 epochs (Howard 2018, arXiv 1801.06146). Takes the place of what the scenario freezes, and of --epochs."""
    epochs: int | Auto = "auto"
    """Passes over the training images; auto is 0 where the solved head is all that learns."""
    budget: Annotated[str, tyro.conf.arg(metavar="TIME")] = ""
    """Time that the whole run may take, such as 90s, 10m or 2h: the first steps are measured, epochs and, where that is
    "auto", image size are made to fit, and the best so far is there in time. Each image is looked at once: without the
    views that few images have otherwise."""
    batch_size: int | Auto = 32
    """Images a step; 32 keeps BatchNorm's statistics usable and the memory of a laptop free. auto measures whether 64,
    or with adam and adamw 128, make an image cheaper; the default rates are for such sizes."""
    gradient_accumulation: int = 1
    """Parts that a batch is computed in, one after another, their gradients added up: less memory, the same step. Where
    the memory does not suffice it doubles by itself."""
    optimizer: Literal["auto", "adamw", "adam", "sgd"] = "auto"
    """auto: sgd for pretrained networks with BatchNorm, as most published fine-tuning of CNNs has it;
    adamw for the others and for a fresh start."""
    momentum: float = 0.9
    """Momentum of sgd; 0 to below 1."""
    learning_rate: float | Auto = "auto"
    """Rate of the head, above 0. auto: 1e-3 for a random head (sgd 1e-2); a solved head learns at the trunk's rate."""
    trunk_learning_rate: float | Auto = "auto"
    """Rate of the stage below the head, above 0. auto, with sgd and with the others: 1e-3 and 1e-4 where the data is
    near, 1e-2 and 3e-4 where it is far, 1e-2 and 1e-3 from a fresh start (Salman 2020, arXiv 2007.08489)."""
    depth_ratio: float | Auto = "auto"
    """Rate of the lowest stage that learns as a share of the trunk's, above 0 and at most 1; the stages between fall
    evenly. auto: 0.01 where the data is near, 0.1 where it is far (0.03 and 0.3 without BatchNorm), else 1."""
    weight_decay: float | Auto = "auto"
    """Decay of the weights, not of biases and norms. auto: 0.01 with adamw, 5e-4 with sgd, none with adam."""
    schedule: Literal["cosine", "step", "plateau", "one-cycle", "constant"] = "cosine"
    """How the rates fall: cosine after a linear warm-up, by a factor every few epochs (step), when the validation loss
    stops falling (plateau), or up and down once (one-cycle)."""
    warmup_epochs: float = 1.0
    """Epochs in which the rates of the cosine schedule rise from a hundredth; 0 turns the warm-up off."""
    step_epochs: int = 7
    """Epochs between two falls of the step schedule, or without progress before one of the plateau schedule."""
    step_factor: float = 0.1
    """What the rates are multiplied by at a fall of the step and plateau schedules; between 0 and 1."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy; 0 never stops early."""
    max_grad_norm: float | Auto = "auto"
    """Clip the norm of the gradient at this value; 0 does not clip. auto: 1 from a solved head, whose weights may be
    large, else 0."""
    averaging: Literal["none", "ema", "ends"] = "none"
    """Which average of weights is scored and kept: their exponential moving one over the steps, or that of the start
    and the best if it is no worse (Wortsman 2022, arXiv 2109.01903)."""
    ema_decay: float = 0.999
    """How much of the moving average a step keeps, above 0 and below 1; less in the first steps."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes; 0 to below 1, with head logits only."""
    loss: Literal["cross-entropy", "hinge"] = "cross-entropy"
    """What is minimised: cross-entropy, or the multi-class hinge loss (Weston 1999), whose head is always trained."""
    imbalance: Literal["none", "class-weights", "balanced-sampling"] = "none"
    """Weigh the loss by class, or draw every class equally often, where some classes have many more images."""

    tracker: Literal["none", "tensorboard", "mlflow", "wandb", "trackio"] = "none"
    """Log every epoch to this experiment tracker too, if it is installed; TensorBoard's files lie in the run folder."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass; auto is bf16 where that is faster: on most GPUs, and on a processor with
    instructions for it for large networks without depthwise convolutions."""
    sync_batch_norm: bool = False
    """Of several processes: let BatchNorm learn from the images that all of them have of a batch, instead of their own.
    It talks in every layer, which takes time; a gradient accumulation is no longer doubled by itself."""
    deterministic: bool = False
    """Compute with deterministic algorithms alone, and decide nothing by the clock: the same command gives the same
    bits again on this machine, which a processor gives anyway where nothing was measured. A GPU is slower by it."""
    workers: int | Auto = "auto"
    """Processes that decode images; auto measures which number is fastest, 0 decodes in the training process.
    Each of several processes has as many."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, all faults in one error."""
        faults = _type_faults(self)
        if not faults:  # else nothing can be compared
            faults = [fault for fault, is_wrong in (self._range_faults() | self._conflicts()).items() if is_wrong]
        if faults:
            raise ConfigError("; ".join(faults), "see `finetune train --help` for the range of each option")

    def _range_faults(self) -> dict[str, bool]:
        return {
            f"--seed must be 0 to 2^31 − 1, got {self.seed}": not 0 <= self.seed < 2**31,
            f"--valid-fraction must be above 0 and at most 0.5, got {self.valid_fraction}": not 0
            < self.valid_fraction
            <= 0.5,
            f"--folds must be 0 or 2 to 20, got {self.folds}": self.folds != 0 and not 2 <= self.folds <= 20,
            f"--image-size must be 1 or more, got {self.image_size}": self.image_size != "auto" and self.image_size < 1,
            f"--views must be 0 or more, got {self.views}": self.views != "auto" and self.views < 0,
            f"--epochs must be 0 or more, got {self.epochs}": self.epochs != "auto" and self.epochs < 0,
            f"--batch-size must be 1 or more, got {self.batch_size}": self.batch_size != "auto" and self.batch_size < 1,
            f"--gradient-accumulation must be 1 or more, got {self.gradient_accumulation}": self.gradient_accumulation
            < 1,
            f"--random-erasing must be 0 to 1, got {self.random_erasing}": not 0 <= self.random_erasing <= 1,
            f"--mixup must be 0 or more, got {self.mixup}": not 0 <= self.mixup < float("inf"),
            f"--cutmix must be 0 or more, got {self.cutmix}": not 0 <= self.cutmix < float("inf"),
            f"--ema-decay must be above 0 and below 1, got {self.ema_decay}": not 0 < self.ema_decay < 1,
            f"--momentum must be 0 to below 1, got {self.momentum}": not 0 <= self.momentum < 1,
            f"--learning-rate must be above 0, got {self.learning_rate}": not _is_auto_or_positive(self.learning_rate),
            f"--trunk-learning-rate must be above 0, got {self.trunk_learning_rate}": not _is_auto_or_positive(
                self.trunk_learning_rate
            ),
            f"--depth-ratio must be above 0 and at most 1, got {self.depth_ratio}": self.depth_ratio != "auto"
            and not 0 < self.depth_ratio <= 1,
            f"--weight-decay must be 0 or more, got {self.weight_decay}": self.weight_decay != "auto"
            and not 0 <= self.weight_decay < float("inf"),
            f"--warmup-epochs must be 0 or more, got {self.warmup_epochs}": not 0 <= self.warmup_epochs < float("inf"),
            f"--step-epochs must be 1 or more, got {self.step_epochs}": self.step_epochs < 1,
            f"--step-factor must be above 0 and below 1, got {self.step_factor}": not 0 < self.step_factor < 1,
            f"--patience must be 0 or more, got {self.patience}": self.patience < 0,
            f"--max-grad-norm must be 0 or more, got {self.max_grad_norm}": self.max_grad_norm != "auto"
            and not 0 <= self.max_grad_norm < float("inf"),
            f"--label-smoothing must be 0 to below 1, got {self.label_smoothing}": not 0 <= self.label_smoothing < 1,
            f"--workers must be 0 or more, got {self.workers}": self.workers != "auto" and self.workers < 0,
            f"--phases: {_fault(parse_phases, self.phases)}": bool(_fault(parse_phases, self.phases)),
            f"--budget: {_fault(parse_seconds, self.budget)}": bool(_fault(parse_seconds, self.budget)),
        }

    def _conflicts(self) -> dict[str, bool]:
        return {
            "--folds trains many times, --budget once": self.folds > 0 and bool(self.budget),
            "--folds lets what it holds back choose no weights, --patience and --averaging ends do": self.folds > 0
            and (self.patience > 0 or self.averaging == "ends"),
            "--budget plans the epochs of one phase, not of several --phases": bool(self.budget and self.phases)
            and not self.resume,
            "--phases says how many epochs there are and what learns: leave out --epochs, --feature-extract and --head "
            "knn": bool(self.phases)
            and not self.resume
            and (self.epochs != "auto" or self.feature_extract or self.head == "knn"),
            "--deterministic decides nothing by the clock, --budget and --batch-size auto do": self.deterministic
            and (bool(self.budget) or self.batch_size == "auto"),
            "--resume and --overwrite exclude each other": self.resume and self.overwrite,
            "--label-smoothing needs --head logits and --loss cross-entropy": self.label_smoothing > 0
            and (self.head != "logits" or self.loss == "hinge"),
            "--mixup and --cutmix need --head logits and --loss cross-entropy": (self.mixup > 0 or self.cutmix > 0)
            and (self.head != "logits" or self.loss == "hinge"),
            "--boundary-cache always keeps what frozen layers gave, --cutmix and --random-erasing change the pixels": (
                self.cutmix > 0 or self.random_erasing > 0
            )
            and self.boundary_cache == "always",
            "--head-stages all needs a solved head: no --head knn, --head-start random, --loss hinge or --scenario "
            "large-different": self.head_stages == "all"
            and (
                self.head == "knn"
                or self.head_start == "random"
                or self.loss == "hinge"
                or self.scenario == "large-different"
            ),
            "--loss hinge needs --head logits": self.loss == "hinge" and self.head != "logits",
            f"--head knn freezes all, --scenario {self.scenario} does not": self.head == "knn"
            and self.scenario not in ("auto", "small-similar"),
            "--model knn needs --head knn": self.model == "knn" and self.head != "knn",
            f"--feature-extract freezes all but the head, --scenario {self.scenario} does not": self.feature_extract
            and self.scenario not in ("auto", "small-similar"),
            "--scenario large-different starts fresh and takes no --weights": self.scenario == "large-different"
            and self.weights is not None,
            "--resume needs --output, the run folder to go on with": self.resume and self.output is None,
        }


def _fault(parse: Callable[[str], object], text: str) -> str:
    """Return why `parse` refuses `text`, nothing if it does not or there is none."""
    try:
        if text:
            parse(text)
    except ConfigError as error:
        return f"{error.message}; {error.hint}"
    return ""


def _is_auto_or_positive(value: float | Auto) -> bool:
    return value == "auto" or 0 < value < float("inf")


OPTION_NAMES = tuple(field.name for field in fields(TrainConfig))
"""The names of all options, in the order of the help."""


def flag_of(name: str) -> str:
    """Return the option called `name` as the command line has it."""
    return f"--{name.replace('_', '-')}"


def with_options(config: TrainConfig, values: Mapping[str, object]) -> TrainConfig:
    """Return `config` with the options named in `values` changed; a text does for a path, a whole number for a float.

    Raises:
        ConfigError: Options are unknown, of the wrong type, out of range, or in conflict; all faults together.
    """
    if unknown := [name for name in values if name not in OPTION_NAMES]:
        raise ConfigError(f"unknown options: {first_ten(unknown)}", nearest(unknown[0], OPTION_NAMES))
    typed: dict[str, Any] = {name: _converted(value, _alternatives(_hints()[name])) for name, value in values.items()}
    return replace(config, **typed)


def _converted(value: object, allowed: Sequence[object]) -> object:
    if Path in allowed and isinstance(value, str):
        return Path(value)
    if float in allowed and type(value) is int:
        return float(value)
    if str in allowed and isinstance(value, Path):
        return str(value)
    return value


def _type_faults(config: TrainConfig) -> list[str]:
    """Return what is wrong with the types of the values in `config`."""
    faults = []
    for name in OPTION_NAMES:
        value, allowed = getattr(config, name), _alternatives(_hints()[name])
        kinds = tuple(kind for kind in allowed if isinstance(kind, type))
        literals = [kind for kind in allowed if not isinstance(kind, type)]
        is_number = float in kinds and type(value) is int
        if (
            value in literals
            or is_number
            or (isinstance(value, kinds) and not (type(value) is bool and bool not in kinds))
        ):
            continue
        expected = " or ".join(kind.__name__ if isinstance(kind, type) else repr(kind) for kind in allowed)
        faults.append(f"{name} must be {expected}, got {value!r}")
    return faults


@cache
def _hints() -> dict[str, object]:
    return typing.get_type_hints(TrainConfig)


def _alternatives(hint: object) -> list[object]:
    """Return the types and the literal values that `hint` allows."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return [kind for part in typing.get_args(hint) for kind in _alternatives(part)]
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [hint]

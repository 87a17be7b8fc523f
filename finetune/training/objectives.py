"""What training minimises: the loss that fits the head, and inception's second one."""

from typing import Literal

import torch
from torch import nn

from finetune.errors import ConfigError
from finetune.models.heads import output_kind
from finetune.runs.model_file import HeadKind

# Shapes: B batch, K classes.

AUXILIARY_WEIGHT = 0.4  # Szegedy 2015, arXiv 1512.00567, as torchvision's recipe weighs it


def build_criterion(
    head: HeadKind,
    *,
    loss: Literal["cross-entropy", "hinge"] = "cross-entropy",
    label_smoothing: float = 0.0,
    class_weights_K: torch.Tensor | None = None,
) -> nn.Module:
    """Return the loss `loss` of a head of logits, or the negative log-likelihood for one of log-probabilities.

    The hinge loss is the mean over the wrong classes j of max(0, 1 - s_y + s_j): Weston & Watkins 1999, Support vector
    machines for multi-class pattern recognition.
    """
    if head != "logits":
        return nn.NLLLoss(weight=class_weights_K)
    if loss == "hinge":
        return nn.MultiMarginLoss(weight=class_weights_K)
    return nn.CrossEntropyLoss(weight=class_weights_K, label_smoothing=label_smoothing)


def check_pairing(model: nn.Module, criterion: nn.Module) -> None:
    """Refuse the two pairings that train, badly and silently: softmax taken twice, or never.

    Raises:
        ConfigError: Cross-entropy on log-probabilities, or the negative log-likelihood on logits.
    """
    kind = output_kind(model)
    if isinstance(criterion, nn.CrossEntropyLoss) and kind == "log_softmax":
        raise ConfigError(
            "cross-entropy applies a softmax, and the model's head has applied one already",
            "use nn.NLLLoss, or initialize_model(..., head='logits')",
        )
    if isinstance(criterion, nn.NLLLoss) and kind == "logits":
        raise ConfigError(
            "the negative log-likelihood needs log-probabilities, and the model's head gives logits",
            "use nn.CrossEntropyLoss, or initialize_model(..., head='log_softmax')",
        )


def total_loss(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None],
    class_indices_B: torch.Tensor,
    criterion: nn.Module,
) -> torch.Tensor:
    """Return the loss of a batch; inception in training mode gives two outputs: main + 0.4 · auxiliary."""
    if isinstance(outputs, torch.Tensor):
        return torch.as_tensor(criterion(outputs, class_indices_B))
    main_BK, auxiliary_BK = outputs
    loss = torch.as_tensor(criterion(main_BK, class_indices_B))
    return loss if auxiliary_BK is None else loss + AUXILIARY_WEIGHT * criterion(auxiliary_BK, class_indices_B)


def main_output(outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """Return the output that predicts, (B, K)."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def balanced_class_weights(counts_K: torch.Tensor) -> torch.Tensor:
    """Return weights (K,) inverse to the class counts with mean 1 over the images; a class without images gets 0."""
    present_K = counts_K > 0
    weights_K = counts_K.sum() / (present_K.sum() * counts_K.clamp(min=1).float())
    return torch.where(present_K, weights_K, torch.zeros_like(weights_K))

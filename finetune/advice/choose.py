"""From evidence to a scenario, with the reason in a sentence."""

import math
from dataclasses import dataclass
from typing import Any

from finetune.advice.measure import Evidence
from finetune.models.freezing import LITTLE_BELOW, MEDIUM_BELOW, Scenario, amount

NEAR = 0.7
"""Similarity from which the data counts as near. Of the sets in Kornblith 2019 (arXiv 1805.08974) and Salman 2020
(arXiv 2007.08489), those whose ResNet-50 probe covers more than this gain under 8 points by fine-tuning; the ones below
about 0.55 (cars, aircraft, birds) gain over 20."""

CARRIES = 0.1
"""Similarity under which pretrained features say next to nothing, so that a fresh start loses nothing."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The scenario chosen, what it was chosen over, and why."""

    scenario: Scenario
    recommended: Scenario
    runner_up: Scenario | None
    reason: str
    evidence: Evidence

    def to_json(self) -> dict[str, Any]:
        """Return plain values for advice.json."""
        return {
            "scenario": self.scenario,
            "recommended": self.recommended,
            "runner_up": self.runner_up,
            "reason": self.reason,
            "evidence": {**vars(self.evidence), "similarity": self.evidence.similarity},
        }


def choose(evidence: Evidence, *, requested: Scenario | None = None, has_body: bool = True) -> Advice:
    """Choose the scenario for `evidence`; a `requested` one is taken, with the recommendation beside it.

    A network without a body, a linear classifier on pixels for one, leaves no choice.
    """
    if not has_body:
        reason = "the network is nothing but its output layer, so there is nothing to freeze."
        return Advice(
            scenario="small-similar", recommended="small-similar", runner_up=None, reason=reason, evidence=evidence
        )
    recommended = _scenario(
        similarity=evidence.similarity,
        images_per_class=evidence.images_per_class,
        is_pretrained=evidence.is_pretrained,
    )
    reason = _reason(evidence, recommended)
    if requested is not None and requested != recommended:
        reason = f"{requested} was asked for; the measurement speaks for {recommended}: {reason}"
    return Advice(
        scenario=requested or recommended,
        recommended=recommended,
        runner_up=_runner_up(evidence, recommended),
        reason=reason,
        evidence=evidence,
    )


def _scenario(*, similarity: float, images_per_class: float, is_pretrained: bool) -> Scenario:
    size = amount(images_per_class)
    if not is_pretrained:
        return "large-different"
    if similarity >= NEAR:
        return "small-similar" if size == "little" else "large-similar"
    if size != "much":
        return "small-different"
    # Even far from its data a pretrained start usually beats a fresh one (Evci 2022, arXiv 2201.03529).
    return "large-similar" if similarity >= CARRIES else "large-different"


def _runner_up(evidence: Evidence, recommended: Scenario) -> Scenario | None:
    """Return what would be chosen if the measure nearest to one of its thresholds fell on the other side of it.

    Distances are in similarity, and in decades of images a class. Without pretrained weights nothing else is open.
    """
    flips: list[tuple[float, float, float]] = []
    for threshold in (NEAR, CARRIES):
        other = threshold - 1e-6 if evidence.similarity >= threshold else threshold
        flips.append((abs(evidence.similarity - threshold), other, evidence.images_per_class))
    for images in (LITTLE_BELOW, MEDIUM_BELOW):
        other = images / 2 if evidence.images_per_class >= images else images
        flips.append((abs(math.log10(evidence.images_per_class / images)), evidence.similarity, other))
    for _, similarity, images_per_class in sorted(flips):
        scenario = _scenario(
            similarity=similarity, images_per_class=images_per_class, is_pretrained=evidence.is_pretrained
        )
        if scenario != recommended:
            return scenario
    return None


def _reason(evidence: Evidence, scenario: Scenario) -> str:
    if not evidence.is_pretrained:
        return "the network starts without pretrained weights, so there is nothing worth freezing and all layers learn."
    reached = evidence.knn_accuracy if evidence.probe_accuracy is None else evidence.probe_accuracy
    what = "the nearest neighbours" if evidence.probe_accuracy is None else "a linear probe"
    likeness = "close to" if evidence.similarity >= NEAR else "unlike"
    actions = {
        "small-similar": "so only the new head learns",
        "small-different": "so the early layers stay frozen and the upper ones adapt",
        "large-similar": "so all layers learn, from the pretrained start",
        "large-different": "so all layers learn from a fresh start",
    }
    assert reached is not None  # a pretrained network has been asked
    return (
        f"{what} on the frozen features reaches {reached:.1%} where always naming the largest class would reach "
        f"{evidence.majority_accuracy:.1%}, so the images are {likeness} what the network has learned; there are "
        f"{evidence.images_per_class:.0f} images a class, {actions[scenario]}."
    )

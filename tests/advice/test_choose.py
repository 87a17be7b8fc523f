"""The table of choices: how near, how much, pretrained or not; and the sentence that gives the reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.advice.choose import CARRIES, NEAR, choose
from finetune.advice.measure import Evidence
from finetune.models.freezing import LITTLE_BELOW, MEDIUM_BELOW, Scenario
from finetune.runs import strict_json

SCENARIOS: tuple[Scenario, ...] = ("small-similar", "large-similar", "small-different", "large-different")
NEAR_BY, FAR, STRANGE = 0.95, 0.6, 0.105  # probe accuracies: similarity 0.944, 0.556 and 0.006
LITTLE, MEDIUM, MUCH = 20.0, 100.0, 1_000.0


def evidence(
    probe_accuracy: float | None,
    images_per_class: float,
    *,
    is_pretrained: bool = True,
    majority_accuracy: float = 0.1,
    knn_accuracy: float = 0.5,
) -> Evidence:
    return Evidence(
        images=round(10 * images_per_class),
        classes=10,
        images_per_class=images_per_class,
        smallest_class=1,
        majority_accuracy=majority_accuracy,
        knn_accuracy=knn_accuracy,
        probe_accuracy=probe_accuracy,
        probe_spread=None if probe_accuracy is None else 0.02,
        is_pretrained=is_pretrained,
    )


@pytest.mark.parametrize(
    ("probe_accuracy", "images_per_class", "scenario"),
    [
        (NEAR_BY, LITTLE, "small-similar"),
        (NEAR_BY, MEDIUM, "large-similar"),
        (NEAR_BY, MUCH, "large-similar"),
        (FAR, LITTLE, "small-different"),
        (FAR, MEDIUM, "small-different"),
        (FAR, MUCH, "large-similar"),
        (STRANGE, LITTLE, "small-different"),
        (STRANGE, MEDIUM, "small-different"),
        (STRANGE, MUCH, "large-different"),
    ],
)
def test_table_of_choices(probe_accuracy: float, images_per_class: float, scenario: Scenario) -> None:
    advice = choose(evidence(probe_accuracy, images_per_class))
    assert (advice.scenario, advice.recommended) == (scenario, scenario)
    assert advice.runner_up != scenario


@pytest.mark.parametrize("probe_accuracy", [NEAR_BY, FAR, STRANGE])
@pytest.mark.parametrize("images_per_class", [LITTLE, MEDIUM, MUCH])
def test_network_that_learned_nothing_learns_everywhere(probe_accuracy: float, images_per_class: float) -> None:
    advice = choose(evidence(probe_accuracy, images_per_class, is_pretrained=False))
    assert advice.scenario == "large-different"
    assert "without pretrained weights" in advice.reason


def test_thresholds_belong_to_the_upper_side() -> None:
    assert choose(evidence(NEAR, LITTLE, majority_accuracy=0.0)).scenario == "small-similar"
    assert choose(evidence(NEAR_BY, LITTLE_BELOW)).scenario == "large-similar"
    assert choose(evidence(FAR, MEDIUM_BELOW)).scenario == "large-similar"
    assert choose(evidence(CARRIES, MUCH, majority_accuracy=0.0)).scenario == "large-similar"


@pytest.mark.parametrize(
    ("probe_accuracy", "images_per_class", "runner_up"),
    [
        (NEAR_BY, LITTLE_BELOW - 1, "large-similar"),
        (0.74, 5.0, "small-different"),
        (0.74, MEDIUM, "small-different"),
        (NEAR_BY, LITTLE_BELOW + 1, "small-similar"),
        (0.72, LITTLE, "small-similar"),
        (FAR, MUCH, "small-different"),
        pytest.param(STRANGE, MUCH, "large-similar", id="just below CARRIES"),
        pytest.param(0.2, MUCH, "large-different", id="just above CARRIES"),
    ],
)
def test_runner_up_lies_over_the_nearest_threshold(
    probe_accuracy: float, images_per_class: float, runner_up: Scenario
) -> None:
    assert choose(evidence(probe_accuracy, images_per_class)).runner_up == runner_up


@settings(deadline=None)
@given(
    probe_accuracy=st.none() | st.floats(0, 1),
    images_per_class=st.floats(1, 1e6),
    majority_accuracy=st.floats(0.01, 1),
    knn_accuracy=st.floats(0, 1),
    is_pretrained=st.booleans(),
    requested=st.none() | st.sampled_from(SCENARIOS),
)
def test_any_evidence_gives_a_choice_and_another(
    probe_accuracy: float | None,
    images_per_class: float,
    majority_accuracy: float,
    knn_accuracy: float,
    is_pretrained: bool,
    requested: Scenario | None,
) -> None:
    found = evidence(
        probe_accuracy,
        images_per_class,
        is_pretrained=is_pretrained,
        majority_accuracy=majority_accuracy,
        knn_accuracy=knn_accuracy,
    )
    advice = choose(found, requested=requested)
    assert {advice.scenario, advice.recommended} <= set(SCENARIOS)
    assert (advice.runner_up is None) == (not is_pretrained)
    assert advice.runner_up != advice.recommended
    assert advice.recommended == choose(found).recommended
    assert advice.scenario == (requested or advice.recommended)
    assert strict_json.parse(strict_json.dump(advice.to_json()))["evidence"]["similarity"] == found.similarity


def test_reason_names_the_numbers_it_rests_on() -> None:
    reason = choose(evidence(0.953, 20.4, majority_accuracy=0.112)).reason
    assert "a linear probe on the frozen features reaches 95.3%" in reason
    assert "11.2%" in reason
    assert "20 images a class" in reason
    assert "close to what the network has learned" in reason
    assert "only the new head learns" in reason


def test_reason_of_far_images() -> None:
    reason = choose(evidence(FAR, MEDIUM)).reason
    assert "60.0%" in reason
    assert "unlike what the network has learned" in reason
    assert "the early layers stay frozen" in reason


def test_neighbours_speak_where_the_probe_cannot_be_scored() -> None:
    advice = choose(evidence(None, 1.0, knn_accuracy=0.9))
    assert advice.scenario == "small-similar"
    assert "the nearest neighbours on the frozen features reaches 90.0%" in advice.reason


@pytest.mark.parametrize("requested", SCENARIOS)
def test_requested_scenario_is_kept_beside_the_recommendation(requested: Scenario) -> None:
    advice = choose(evidence(NEAR_BY, LITTLE), requested=requested)
    assert (advice.scenario, advice.recommended) == (requested, "small-similar")
    told = f"{requested} was asked for; the measurement speaks for small-similar: "
    assert advice.reason.startswith(told) == (requested != "small-similar")
    assert "95.0%" in advice.reason


def test_advice_is_strict_json() -> None:
    values = strict_json.parse(strict_json.dump(choose(evidence(None, LITTLE), requested="large-similar").to_json()))
    assert list(values) == ["scenario", "recommended", "runner_up", "reason", "evidence"]
    assert (values["scenario"], values["recommended"]) == ("large-similar", "small-different")
    assert values["evidence"]["probe_accuracy"] is None
    assert values["evidence"]["similarity"] == pytest.approx(4 / 9)
    assert values["evidence"]["images_per_class"] == LITTLE

"""Every "auto" resolved."""

import pytest

from finetune.config import TrainConfig
from finetune.config.phases import parse_phases
from finetune.training.plan import Plan, make_plan, phases_text, plan_phases


def plan(
    scenario: str, *, can_solve_head: bool = True, has_batch_norm: bool = False, images: int = 320, **options: object
) -> Plan:
    config = TrainConfig(data="x", **options)  # type: ignore[arg-type]
    return make_plan(
        config,
        scenario=scenario,
        frozen_stages=("stem",),
        can_solve_head=can_solve_head,
        has_batch_norm=has_batch_norm,
        images=images,  # type: ignore[arg-type]
    )


def test_a_solved_head_alone_needs_no_epochs() -> None:
    assert plan("small-similar").epochs == 0
    assert plan("small-similar", epochs=3).epochs == 3


def test_a_head_that_cannot_be_solved_is_trained() -> None:
    found = plan("small-similar", can_solve_head=False)
    assert found.head_start == "random"
    assert found.epochs > 0
    assert found.learning_rate == 1e-3


@pytest.mark.parametrize(("images", "epochs"), [(320, 10), (3_200, 5), (320_000, 3)])
def test_fine_tuning_lasts_about_five_hundred_steps(images: int, epochs: int) -> None:
    assert plan("large-similar", images=images).epochs == epochs


@pytest.mark.parametrize(("images", "epochs"), [(320, 30), (3_200, 5), (320_000, 3)])
def test_far_data_is_trained_for_longer_where_there_is_little_of_it(images: int, epochs: int) -> None:
    assert plan("small-different", images=images).epochs == epochs


def test_a_fresh_start_has_a_random_head_a_high_rate_and_its_own_statistics() -> None:
    found = plan("large-different")
    assert (found.start, found.head_start, found.batch_norm) == ("fresh", "random", "train")
    assert found.trunk_learning_rate == 1e-3


def test_a_solved_head_learns_at_the_rate_of_the_trunk() -> None:
    found = plan("large-similar")
    assert found.learning_rate == found.trunk_learning_rate == 1e-4
    assert plan("large-similar", optimizer="sgd").trunk_learning_rate == pytest.approx(1e-3)


def test_the_gradient_is_clipped_from_a_solved_head_and_where_that_is_asked_for() -> None:
    assert plan("small-different").max_grad_norm == 1.0
    assert plan("small-different", head_start="random").max_grad_norm == 0.0
    assert plan("small-different", max_grad_norm=0.0).max_grad_norm == 0.0
    assert plan("large-different", max_grad_norm=0.3).max_grad_norm == 0.3


def test_what_is_given_is_taken() -> None:
    found = plan("small-different", learning_rate=0.3, trunk_learning_rate=0.2, epochs=7, head_start="random")
    assert (found.learning_rate, found.trunk_learning_rate, found.epochs) == (0.3, 0.2, 7)
    assert found.head_start == "random"


def test_statistics_follow_large_data_only() -> None:
    assert plan("large-similar", images=19_999).batch_norm == "eval"
    assert plan("large-similar", images=20_000).batch_norm == "train"


@pytest.mark.parametrize(
    ("scenario", "has_batch_norm", "optimizer", "rate", "decay"),
    [
        ("large-similar", True, "sgd", 1e-3, 5e-4),
        ("large-similar", False, "adamw", 1e-4, 0.01),
        ("large-different", True, "adamw", 1e-3, 0.01),
    ],
)
def test_the_optimiser_follows_the_network_and_the_start(
    scenario: str, has_batch_norm: bool, optimizer: str, rate: float, decay: float
) -> None:
    found = plan(scenario, has_batch_norm=has_batch_norm)
    assert (found.optimizer, found.trunk_learning_rate, found.weight_decay) == (optimizer, pytest.approx(rate), decay)
    assert plan(scenario, has_batch_norm=has_batch_norm, weight_decay=0.3).weight_decay == 0.3


STAGES = ("stem", "one", "two", "three", "head")


def frozen_and_lengths(phases: str) -> list[tuple[tuple[str, ...], int, float]]:
    plans = plan_phases(plan("large-similar"), parse_phases(phases), STAGES)
    return [(each.frozen_stages, each.epochs, each.rate_share) for each in plans]


def test_each_phase_freezes_what_it_says() -> None:
    assert frozen_and_lengths("head:5,top2:3,all:10:0.1") == [
        (STAGES[:-1], 5, 1.0),
        (STAGES[:2], 3, 1.0),
        ((), 10, 0.1),
    ]
    assert frozen_and_lengths("top9:1") == [((), 1, 1.0)]


def test_gradual_unfreezing_frees_one_stage_after_the_other() -> None:
    assert frozen_and_lengths("gradual:2") == [(STAGES[:count], 2, 1.0) for count in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize("share", ["0.1", "0.1234567891", "1e-7", "1000000", "1e30", "1e+30"])
def test_shares_of_phases_are_written_to_the_last_digit(share: str) -> None:
    plans = plan_phases(plan("large-similar"), parse_phases(f"all:1:{share}"), STAGES)
    assert plans[0].rate_share == float(share)
    assert plan_phases(plan("large-similar"), parse_phases(phases_text(plans, STAGES)), STAGES) == plans


def test_phases_are_written_as_they_are_read() -> None:
    plans = plan_phases(plan("large-similar"), parse_phases("gradual:2,top2:3:0.5"), STAGES)
    text = phases_text(plans, STAGES)
    assert text == "head:2:1,top1:2:1,top2:2:1,top3:2:1,all:2:1,top2:3:0.5"
    assert plan_phases(plan("large-similar"), parse_phases(text), STAGES) == plans


def test_without_phases_the_plan_is_what_the_scenario_says() -> None:
    whole = plan("large-similar")
    assert plan_phases(whole, (), STAGES) == (whole,)

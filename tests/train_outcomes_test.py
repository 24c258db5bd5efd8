"""The outcome of a source by default and by name."""

import pytest

from train.rl import outcomes
from train.rl import sample as sample_lib
from train.rl.rewards import catalog, compose, length_bias

EXACT, FORMAT, GRADED = (("exact", 1.0, ()), ("format", 0.1, ()), ("graded", 1.0, ()))
PARTS = (("verl", (("acc", 1.0), ("style", 0.1)), ()),)


def reader(terms, has_environment=False, named=()):
    rewards = compose.RewardsConfig(sources=(("*", terms),)) if terms else None
    return outcomes.OutcomeReader(["s"], rewards, has_environment, named)


@pytest.mark.parametrize(
    ("terms", "has_environment", "wanted"),
    [
        ((EXACT,), False, "exact"),
        ((FORMAT, EXACT, GRADED), False, "exact"),
        ((GRADED, EXACT), False, "graded"),
        ((FORMAT,), False, "format"),
        ((FORMAT,), True, "environment"),
        ((EXACT,), True, "environment"),
        ((), True, "environment"),
        (PARTS, False, "verl"),
        # For the log alone, and a penalty.
        ((("exact", 0.0, ()), ("function", -1.0, ()), GRADED), False, "graded"),
        ((("exact", 0.0, ()), FORMAT), False, "exact"),
    ],
)
def test_outcomes_without_a_name(terms, has_environment, wanted):
    assert reader(terms, has_environment).name("s") == wanted


@pytest.mark.parametrize(
    ("terms", "named", "parts", "wanted"),
    [
        ((EXACT, FORMAT), (), {"exact": 1.0, "format": 0.5}, 1.0),
        (PARTS, (), {"verl/acc": 1.0, "verl/style": 1.0, "verl/length": 9.0}, 1.0),
        (PARTS, (("s", "verl/length"),), {"verl/acc": 1.0, "verl/length": 9.0}, 9.0),
        ((("verl", 2.0, ()),), (), {"verl/a": 0.5, "verl/b": 0.25}, 0.75),
        ((EXACT, FORMAT), (("*", "format"),), {"exact": 1.0, "format": 0.5}, 0.5),
        (
            (("verl", (("cost", -0.1), ("log", 0.0), ("acc", 1.0)), ()),),
            (),
            {"verl/cost": 7.0, "verl/log": 5.0, "verl/acc": 0.5},
            0.5,
        ),
        ((EXACT,), (), {"other": 1.0, "exactly": 1.0}, None),
    ],
)
def test_reading_outcomes(terms, named, parts, wanted):
    sample = sample_lib.Sample(sample_lib.Task("t", (), "s"), (1,), parts=parts)
    assert reader(terms, named=named).read(sample, None) == wanted


def test_an_agent_may_name_a_part_of_its_environments_reward():
    parts = {"final": 1.0, "turns": 0.25, "format": 0.1}
    sample = sample_lib.Sample(sample_lib.Task("t", (), "s"), (1,), parts=parts)
    assert reader((FORMAT,), True).read(sample, 1.25) == 1.25
    assert reader((FORMAT,), True, (("s", "final"),)).read(sample, 1.25) == 1.0
    assert reader((FORMAT,), True, (("s", "turns"),)).read(sample, 1.25) == 0.25


def test_a_source_of_its_own_name_comes_before_the_others():
    named = (("*", "format"), ("s", "exact"))
    assert reader((EXACT, FORMAT), named=named).name("s") == "exact"
    for wrong in ("exakt", "exakt/part", "environment"):
        with pytest.raises(ValueError, match=f"got '{wrong}'; wanted one of exact, format, or a"):
            reader((EXACT, FORMAT), named=(("s", wrong),))


def test_names_of_the_catalogue():
    """They stand in other files, so that a config can be made without the rewards' libraries."""
    names = (*outcomes.SHAPING_REWARDS, *length_bias.JUDGE_REWARDS)
    assert set(names) <= set(catalog.REWARD_FACTORIES)

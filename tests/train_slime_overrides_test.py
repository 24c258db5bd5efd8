"""Configs of reinforcement learning: what they refuse, and what slime's flags make of them."""

import dataclasses

import pytest

from train.rl import config as rl_config
from train.rl import length_schedule, objective, slime_overrides, tasks


def config(**changes):
    fields = {
        "checkpoint": "c",
        "batches": 3,
        "sources": (tasks.TaskSource("a", "a.jsonl"), tasks.TaskSource("b", "b.jsonl")),
        "rollout": rl_config.RolloutConfig(
            4, length_schedule.LengthSchedule((64, 96)), 32, group_size=2
        ),
        "update": rl_config.UpdateConfig(1e-6, minibatches=2),
        "rewards": rl_config.RewardsConfig(
            sources=(("a", (("exact", 1.0, ()),)), ("b", (("format", 1.0, ()),)))
        ),
    }
    return rl_config.RlConfig(**fields | changes)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("rollout", {"groups": 0}),
        ("rollout", {"group_size": 1}),
        ("rollout", {"max_prompt_tokens": 0}),
        ("rollout", {"max_rounds": 0}),
        ("rollout", {"partial_tokens": -1}),
        ("rollout", {"max_staleness": -1}),
        ("rollout", {"oversample": 0.9}),
        ("rollout", {"overlong_buffer_tokens": 65}),
        ("rollout", {"temperature": 0.0}),
        ("update", {"rows": 0}),
        ("update", {"learning_rate": -1.0}),
        ("update", {"warmup_steps": -1}),
        ("evaluation", {"every_batches": 1}),
        ("evaluation", {"every_batches": -1}),
        ("evaluation", {"samples": 0}),
        ("evaluation", {"temperature": -1.0}),
    ],
)
def test_parts_out_of_range(part, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .*; wanted|a source, as"):
        dataclasses.replace(getattr(config(), part), **wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": 0}, "batches: got 0"),
        ({"sources": ()}, "sources: .*at least one"),
        ({"sources": (tasks.TaskSource("a", "x"), tasks.TaskSource("a", "y"))}, "different names"),
        ({"rewards": None}, "rewards: got None; wanted some, as there is no agent"),
        ({"checkpoint": ""}, "checkpoint"),
        ({"dtype": "float16"}, "dtype: got 'float16'"),
        ({"remat": "some"}, "remat: got 'some'"),
        (
            {"update": rl_config.UpdateConfig(1e-6, minibatches=3)},
            r"a divisor of rollout\.groups = 4",
        ),
        (
            {"curriculum": rl_config.CurriculumConfig(((0, (("c", 1.0),)),))},
            r"curriculum: got \['c'\]",
        ),
        (
            {
                "agent": rl_config.AgentConfig("lookup"),
                "rollout": rl_config.RolloutConfig(
                    2, length_schedule.LengthSchedule((9,)), 9, partial_tokens=5
                ),
            },
            "0 with an agent",
        ),
    ],
)
def test_runs_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_without_a_curriculum_sources_weigh_the_same():
    assert config(seed=7).task_curriculum().weights_at(5) == {"a": 0.5, "b": 0.5}
    assert config(seed=7).task_curriculum().seed == 7
    curriculum = rl_config.CurriculumConfig(((0, (("b", 1.0),)),))
    assert config(curriculum=curriculum).task_curriculum() is curriculum
    assert config().rollout.max_sample_tokens == 32 + 96


# ---- slime's flags


def change(command, **changes):
    return slime_overrides.apply_flags(config(**changes), command.split())


def test_no_flag_changes_nothing():
    assert change("") == (config(), "")


@pytest.mark.parametrize(
    ("command", "part", "wanted"),
    [
        ("--n-samples-per-prompt 6", "rollout", {"group_size": 6}),
        ("--rollout-batch-size 8", "rollout", {"groups": 8, "oversample": 1.0}),
        ("--over-sampling-batch-size 6", "rollout", {"oversample": 1.5}),
        ("--rollout-batch-size 2 --over-sampling-batch-size 6", "rollout", {"oversample": 3.0}),
        ("--rollout-max-prompt-len 50", "rollout", {"max_prompt_tokens": 50}),
        ("--rollout-temperature .7", "rollout", {"temperature": 0.7}),
        ("--rollout-top-p .9", "rollout", {"top_p": 0.9}),
        ("--rollout-top-k 40", "rollout", {"top_k": 40}),
        ("--rollout-top-k -1", "rollout", {"top_k": 0}),
        ("--global-batch-size 2", "update", {"minibatches": 4}),
        ("--num-steps-per-rollout 1", "update", {"minibatches": 1}),
        ("--num-steps-per-rollout 4 --global-batch-size 2", "update", {"minibatches": 4}),
        ("--lr 1e-5", "update", {"learning_rate": 1e-5, "minibatches": 2}),
        ("--clip-grad .5", "optimizer", {"clip_norm": 0.5}),
    ],
)
def test_a_flag_changes_its_field_and_no_other(command, part, wanted):
    changed, _ = change(command)
    expected = {part: dataclasses.replace(getattr(config(), part), **wanted)}
    if "groups" in wanted:
        expected = {part: dataclasses.replace(config().rollout, groups=wanted["groups"])}
    if wanted == {"oversample": 3.0}:
        expected = {part: dataclasses.replace(config().rollout, groups=2, oversample=3.0)}
    assert changed == dataclasses.replace(config(), **expected)


@pytest.mark.parametrize(
    ("command", "tokens"),
    [
        ("--rollout-max-response-len 40", (40,)),
        ("--rollout-max-context-len 72", (40,)),
        ("--rollout-max-context-len 72 --rollout-max-prompt-len 20", (52,)),
        ("--rollout-max-context-len 72 --rollout-max-response-len 30", (30,)),
        ("--rollout-max-context-len 72 --rollout-max-response-len 50", (40,)),  # both hold
        ("--lr 1", (64, 96)),
    ],
)
def test_flags_of_length(command, tokens):
    assert change(command)[0].rollout.windows.tokens == tokens


def test_flags_of_the_whole_run():
    changed, _ = change("--num-rollout 9 --rollout-seed 5 --apply-chat-template")
    assert changed == config(batches=9, seed=5)


def test_flags_of_tasks_change_the_first_source():
    changed, _ = change(
        "--prompt-data new.parquet --input-key q --label-key l --metadata-key m --tool-key t "
        "--rm-type math"
    )
    keys = (("prompt", "q"), ("label", "l"), ("metadata", "m"), ("tools", "t"))
    assert changed.sources == (tasks.TaskSource("a", "new.parquet", keys), config().sources[1])
    assert dict(changed.rewards.sources) == {
        "a": (("mathematics", 1.0, ()),),
        "b": (("format", 1.0, ()),),
    }
    generated = (
        tasks.TaskSource("a", make="logic:chain_sum", size=3, options=(("max_terms", 2),)),
    )
    changed, _ = change("--prompt-data new.jsonl", sources=generated)
    assert changed.sources == (tasks.TaskSource("a", "new.jsonl"),)
    agent = {
        "rewards": None,
        "agent": rl_config.AgentConfig("lookup"),
        "sources": config().sources[:1],
    }
    changed, _ = change("--rm-type exact", **agent)
    assert changed.rewards.sources == (("a", (("exact", 1.0, ()),)),)


def test_flags_of_the_objective():
    changed, text = change("--advantage-estimator grpo --eps-clip-high .28")
    assert changed == config(
        objective=dataclasses.replace(objective.PRESETS["grpo"], clip_high=0.28)
    )
    assert text.startswith("objective grpo")
    # Without an estimator it is the config's own that is changed, and told.
    changed, text = change("--eps-clip .1", objective=objective.PRESETS["dapo"])
    expected = dataclasses.replace(objective.PRESETS["dapo"], clip_low=0.1)
    assert changed.objective == expected
    assert text.startswith("objective dapo")
    own = dataclasses.replace(objective.PRESETS["dapo"], clip_high=0.3)
    changed, text = change("--lr 1e-5", objective=own)
    assert changed.objective == own
    assert text.startswith("objective dapo")
    assert "1.3" in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--no-such-flag 1", "--no-such-flag: got an unknown flag"),
        ("--ref-load x", "got --ref-load, which nothing here follows"),
        ("--reward-key score", "got --reward-key, which nothing here follows"),
        ("--apply-chat-template=false", "got false; wanted true"),
        ("--global-batch-size 3", "got 3 of the 8 samples of a batch"),
        ("--global-batch-size 0", "got 0 of the 8 samples of a batch"),
        ("--global-batch-size 4 --num-steps-per-rollout 4", "over it as the number of steps"),
        ("--num-steps-per-rollout 0", "minibatches: got 0"),
        ("--num-steps-per-rollout 3", "a divisor of rollout.groups = 4"),
        ("--rollout-batch-size 0 --over-sampling-batch-size 4", "groups: got 0"),
        ("--over-sampling-batch-size 2", "oversample: got 0.5"),
        ("--rollout-max-context-len 32", "wanted rising numbers above 0"),
        ("--rollout-temperature 0", "temperature: got 0.0"),
        ("--lr 1 --lr 2", "--lr: got 1.0 and 2.0"),
    ],
)
def test_flags_that_cannot_be_followed(command, message):
    with pytest.raises(ValueError, match=message):
        change(command)


def test_every_source_needs_rewards():
    rewards = rl_config.RewardsConfig(sources=(("a", (("exact", 1.0, ()),)),))
    with pytest.raises(ValueError, match="none for b.*wanted rewards for every source"):
        config(rewards=rewards)

"""slime's flags: the intervals that they come to, what is printed, and what is refused."""

import dataclasses

import pytest

from train.rl import objective, rollout_correction, slime_flags


def run(command):
    return slime_flags.translate_flags(slime_flags.parse_flags(command.split()))


@pytest.mark.parametrize(
    ("command", "low", "high"),
    [
        ("", None, 5.0),
        ("--advantage-estimator cispo --eps-clip .2 --eps-clip-high 5", 0.8, 6.0),
        ("--eps-clip=1.0 --eps-clip-high=4.0", None, 5.0),
        ("--eps-clip 10 --eps-clip-high .2", None, 1.2),
        ("--eps-clip-high 0", None, 1.0),
    ],
)
def test_under_cispo_clips_bound_the_weight(command, low, high):
    got = run(command).objective
    assert (got.is_weight_min, got.is_weight_max) == (low, high)
    assert (got.clip_low, got.clip_high) == (None, None)
    assert f"[{'none' if low is None else f'{low:g}'}, {high:g}]" in run(command).text


def test_under_the_ppo_family_clips_drop_tokens():
    got = run("--advantage-estimator grpo --eps-clip 0.1 --eps-clip-high 0.28 --eps-clip-c 3")
    assert got.objective.name == "grpo"
    assert (got.objective.clip_low, got.objective.clip_high) == (0.1, 0.28)
    assert got.objective.dual_clip == 3
    assert "[0.9, 1.28], or is above 3 with A < 0" in got.text
    assert run("--advantage-estimator gspo").objective == objective.PRESETS["gspo"]
    assert run("--advantage-estimator reinforce_plus_plus").objective.name == "reinforce_pp"


def test_absent_flags_take_our_default_and_slimes_is_told():
    lines = run("").text.splitlines()
    assert lines[0] == (
        "objective cispo: weight r within [none, 5]; r of a token against old; "
        "aggregation token-mean (M1's Eq. 4 as printed: prompt-mean)"
    )
    assert lines[1:] == [
        "--advantage-estimator not given: value cispo; slime would use grpo",
        "--eps-clip not given: lowest weight none; slime would use 0.8",
        "--eps-clip-high not given: highest weight 5; slime would use 1.2",
        "--calculate-per-token-loss not given: aggregation token-mean; "
        "slime would use seq-mean-token-mean",
    ]
    lines = run("--advantage-estimator cispo --eps-clip .3 --calculate-per-token-loss").text
    assert "--eps-clip-high not given: highest weight 5; slime would use 1.3" in lines
    assert "--eps-clip not" not in lines
    assert "calculate" not in lines
    lines = run("--advantage-estimator gspo --eps-clip 3e-4 --eps-clip-high 4e-4").text
    assert "not given" not in lines
    lines = run("--advantage-estimator grpo --use-kl-loss --kl-loss-coef .1").text
    assert "--kl-loss-type not given: value k3; slime would use k1" in lines


def test_other_parts_of_the_objective():
    got = run(
        "--use-tis --tis-clip 3 --tis-clip-low .5 --use-kl-loss --kl-loss-coef 0.01 "
        "--kl-loss-type low_var_kl --entropy-coef .001 --disable-grpo-std-normalization"
    ).objective
    assert got.correction == rollout_correction.RolloutCorrection("token", "truncate", 0.5, 3.0)
    assert (got.kl_coef, got.kl_kind, got.kl_max) == (0.01, "k3", 10.0)
    assert (got.entropy_coef, got.advantage) == (0.001, "mean")
    assert run("--use-tis").objective.correction == rollout_correction.RolloutCorrection(high=2.0)
    assert run("--use-rollout-logprobs").objective.anchor == "rollout"
    got = run("--advantage-estimator reinforce_plus_plus --gamma .9 --kl-coef .1").objective
    assert (got.discount, got.reward_kl_coef, got.kl_coef) == (0.9, 0.1, 0)
    got = run("--advantage-estimator grpo --calculate-per-token-loss").objective
    assert got.aggregation == "token-mean"
    got = run("--advantage-estimator dr_grpo --calculate-per-token-loss").objective
    assert (got.aggregation, got.length_max) == ("token-mean", None)


def test_options_by_our_names():
    got = run(
        "--n-samples-per-prompt 8 --rollout-max-response-len 1024 --metadata-key tool_calls "
        "--input-key question --rollout-temperature 0.9 --apply-chat-template"
    )
    assert got.options == {
        "group_size": 8,
        "answer_tokens": 1024,
        "metadata_key": "tool_calls",
        "prompt_key": "question",
        "temperature": 0.9,
        "apply_chat_template": True,
    }
    assert slime_flags.translate_flags({"n_samples_per_prompt": "8"}).options == {"group_size": 8}
    assert slime_flags.translate_flags({"--lr": 1e-6}).options == {"learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--eps-clip-hihg 5", "--eps-clip-hihg: got an unknown flag; did you mean eps-clip-high"),
        ("--xyzzy 5", "--xyzzy: got an unknown flag; wanted one of n-samples-per-prompt, "),
        ("eps-clip 5", "got 'eps-clip'; wanted a flag"),
        ("--eps-clip", "--eps-clip: got no value"),
        ("--eps-clip --use-tis", "--eps-clip: got no value"),
        ("--eps-clip 1 --eps-clip 2", r"--eps-clip: got 1.0 and 2.0"),
        ("--eps-clip high", "--eps-clip: got 'high'; wanted a value of type float"),
        ("--n-samples-per-prompt 1.5", "got '1.5'; wanted a value of type int"),
        ("--use-tis=maybe", "got 'maybe'; wanted true or false"),
        ("--tis-clip 3", "--tis-clip: got it without --use-tis"),
        ("--kl-loss-coef .1", "--kl-loss-coef: got it without --use-kl-loss"),
        ("--use-tis --use-rollout-logprobs", "anchor 'rollout' with a correction"),
        ("--eps-clip-c 3", "cispo with dual_clip"),
        ("--gamma 0.9", "for 'return' and 'return-baseline'"),
        ("--advantage-estimator ppo", "'ppo' needs a critic"),
        ("--normalize-advantages", "which whiten over the batch anyway"),
        ("--use-kl-loss --kl-loss-type kl", "--kl-loss-type: got 'kl'"),
        (
            "--advantage-estimator reinforce_plus_plus --disable-grpo-std-normalization",
            "got advantage 'return'",
        ),
        (
            "--rollout-batch-size 4 --n-samples-per-prompt 8 --global-batch-size 8 "
            "--num-steps-per-rollout 2",
            "got 4 prompts of 8 samples in 2 updates of 8 samples",
        ),
        ("--eps-clip-high -2", "--eps-clip-high: got -2; wanted at least 0"),
    ],
)
def test_mistakes_are_refused(command, message):
    with pytest.raises(ValueError, match=message):
        run(command)


def test_descriptions():
    mix = dataclasses.replace(objective.PRESETS["cispo"], aggregation="mix", mix_lambda=0.5)
    assert "mix (0.5 by sample: our reading of M1 section 5)" in slime_flags.describe_objective(mix)
    assert "weight 1;" in slime_flags.describe_objective(objective.PRESETS["rloo"])
    literal = dataclasses.replace(objective.PRESETS["cispo"], aggregation="prompt-mean")
    assert "most implementations: token-mean" in slime_flags.describe_objective(literal)


@pytest.mark.parametrize("flag", ["eps-clip", "eps-clip-high"])
@pytest.mark.parametrize("estimator", ["cispo", "grpo", "gspo"])
@pytest.mark.parametrize("value", [-0.2, float("nan")])
def test_bounds_on_the_wrong_side_are_refused(flag, estimator, value):
    with pytest.raises(ValueError, match=rf"--{flag}: got (-0\.2|nan); wanted at least 0"):
        slime_flags.translate_flags({flag: value, "advantage-estimator": estimator})


def test_no_clipping_of_gradients_is_slimes_0():
    assert slime_flags.translate_flags({"clip-grad": 0.0}).options["clip_norm"] is None
    assert slime_flags.translate_flags({"clip-grad": 0.5}).options["clip_norm"] == 0.5

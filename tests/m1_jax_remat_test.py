"""Rematerialisation: what each policy keeps, and which one the planner takes."""

import jax
import jax.numpy as jnp
import pytest
from jax import ad_checkpoint

from m1_jax import config, layer_stack
from m1_jax.plan import config as plan_config
from m1_jax.plan import remat_choice

GIB = 2**30
PLAN = plan_config.PlanConfig(
    topology="v5p:8x8x8",
    job="train",
    mesh="fsdp=16,expert=32",
    batch=512,
    remat=plan_config.AUTO_REMAT,
)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("layer", []),
        ("attention", [5]),
        ("dots", [3]),
        ("products", [3, 7]),
        ("none", [3, 5, 7]),
    ],
)
def test_what_a_policy_keeps(policy, kept):
    """Widths tell a dense product (3), attention's output (5) and a product of experts (7)."""

    def layer(x, to_dense, to_attention, to_expert):
        dense = x @ to_dense
        # A product with batch dimensions is no dense one.
        attention = jnp.einsum("bd,bdw->bw", jnp.sin(dense), to_attention)
        attention = ad_checkpoint.checkpoint_name(attention, layer_stack.ATTENTION_NAME)
        gate = jnp.einsum("bd,bdw->bw", jnp.sin(attention), to_expert)
        gate = ad_checkpoint.checkpoint_name(gate, layer_stack.EXPERT_PRODUCT_NAMES[0])
        return jnp.sum(jnp.sin(gate))

    shapes = ((2, 4), (4, 3), (2, 3, 5), (2, 5, 7))
    arguments = [jnp.ones(shape) for shape in shapes]
    _, pull_back = jax.vjp(layer_stack.apply_remat(policy, layer, True), *arguments)
    residuals = {x.shape for x in jax.tree.leaves(pull_back) if x.ndim == 2}
    assert sorted(width for _, width in residuals - set(shapes)) == kept


def make_compiler(gib_by_policy, limit_gib=95.7):
    """Return a stand-in for the compiler, and the policies that it was asked for."""
    asked = []

    def compile_plan(plan):
        asked.append(plan.remat)
        gib = gib_by_policy[plan.remat]
        return {
            **vars(plan),
            "mesh": {"fsdp": 16, "expert": 32},
            "fits": gib <= limit_gib,
            "hbm_bytes_per_chip": gib * GIB,
            "hbm_limit_bytes": limit_gib * GIB,
        }

    return compile_plan, asked


def test_the_fastest_policy_that_fits():
    pytest.importorskip("libtpu")
    # 80 layers, 4,096 tokens of a device, two bytes a number.
    numbers = 80 * 4096 * 2 / GIB
    attention = 6144 * numbers
    dots = attention + (7 / 8 * 4 * 8192 + 1 / 8 * (8192 + 2 * 1024)) * numbers
    products = dots + 2 * (2 * 1.5) * 9216 * numbers
    compile_plan, asked = make_compiler({"layer": 25, "products": 97, "dots": 50})
    record = remat_choice.compile_fastest_policy(PLAN, compile_plan)
    # "none" is predicted to be too large, and "products" needs more than predicted.
    assert asked == ["layer", "products", "dots"]
    assert (record["remat"], record["fits"]) == ("dots", True)
    tried = {trial["remat"]: trial for trial in record["tried_remat"]}
    assert [trial["compiled"] for trial in tried.values()] == [True, False, True, True]
    assert [trial["fits"] for trial in tried.values()] == [True, False, False, True]
    for policy, gib in (("attention", attention), ("dots", dots), ("products", products)):
        extra = remat_choice.predict_extra_bytes(compile_plan(_with_remat("layer")), policy)
        assert extra / GIB == pytest.approx(gib)


def _with_remat(policy):
    return plan_config.PlanConfig(**vars(PLAN) | {"remat": policy})


def test_nothing_else_is_compiled_where_the_leanest_does_not_fit():
    compile_plan, asked = make_compiler({"layer": 96})
    record = remat_choice.compile_fastest_policy(PLAN, compile_plan)
    assert (asked, record["fits"]) == (["layer"], False)


@pytest.mark.parametrize(("job", "remat"), [("train", "all"), ("prefill", "auto")])
def test_other_policies_are_refused(job, remat):
    with pytest.raises(plan_config.PlanError, match=f"remat: got '{remat}' for the job {job}"):
        plan_config.PlanConfig("v5p:8x8x8", job, remat=remat)


def test_policies_are_ordered():
    assert config.REMAT_POLICIES[0] == "none"
    assert remat_choice.LEANEST_POLICY == "layer"

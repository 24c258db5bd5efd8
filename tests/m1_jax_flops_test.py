"""Operations counted by hand, from parameter counts, and by XLA where it counts the same."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from m1_jax import ModelConfig, config, experts, flops, model
from m1_jax import params as params_lib

M1 = ModelConfig.m1()


def test_one_token_of_the_release_by_hand():
    once = flops.count_forward_flops(M1, 1, 4096)
    per_token = {name: value / 4096 for name, value in dataclasses.asdict(once).items()}
    assert per_token == {
        # 70 layers of qkv, gate and out; 10 of query, out, and key and value an eighth as wide.
        "projections": 70 * 2 * 6144 * 5 * 8192 + 10 * 2 * 6144 * (2 * 8192 + 2 * 1024),
        # 64 heads: 128 x 128 twice within a chunk, and twice with the state.
        "lightning": 70 * 64 * 4 * 2 * 128 * 128,
        "softmax": 10 * 64 * 2 * 2 * 128 * 4097 / 2,
        "router": 80 * 2 * 6144 * 32,
        "experts": 80 * 2 * 3 * 2 * 6144 * 9216,
        "head": 2 * 6144 * 200_064,
    }


def test_matrices_are_two_operations_a_parameter():
    params = params_lib.params_by_path(params_lib.abstract_model(M1))
    active = 0.0
    for name, param in params.items():
        axes = param.get_metadata()["logical_axes"]
        if name.startswith("embed") or name.endswith("scale"):
            continue
        active += param.size * (2 / 32 if "experts" in axes else 1)
    once = flops.count_forward_flops(M1, 1, 1)
    assert once.total - once.lightning - once.softmax == 2 * active


@pytest.mark.parametrize("context", [0, 1000])
def test_one_pass_is_its_parts(context):
    """Rows, and a prompt in two parts, add up; but for lightning's chunks, which are whole."""

    def counts(*args, **kwargs):
        return dataclasses.replace(
            flops.count_forward_flops(M1, *args, **kwargs), lightning=0
        ).total

    assert counts(3, 512, context) == 3 * counts(1, 512, context)
    parts = counts(1, 200, context) + counts(1, 312, context + 200)
    assert parts == pytest.approx(counts(1, 512, context), rel=1e-12)


def test_decoding_has_one_token_and_one_row_of_logits():
    once = flops.count_forward_flops(M1, 1, 1, context_tokens=8191, num_logits=1)
    assert once.softmax == 10 * 64 * 2 * 2 * 128 * 8192
    assert once.lightning == 70 * 64 * 2 * 2 * (128 + 128 * 128)
    assert flops.count_forward_flops(M1, 1, 4096, num_logits=1).head == once.head


def test_training_is_three_passes_and_what_is_computed_again():
    once = flops.count_forward_flops(M1, 2, 4096)
    for remat, again in (("none", 0.0), ("layer", once.total - once.head)):
        step = flops.count_train_flops(dataclasses.replace(M1, remat=remat), 2, 4096)
        assert step.model == 3 * once.total
        assert step.recomputed == again + 2 * once.softmax + once.head
        assert step.total == step.model + step.recomputed
    recomputed = [
        flops.count_train_flops(dataclasses.replace(M1, remat=remat), 2, 4096).recomputed
        for remat in config.REMAT_POLICIES
    ]
    assert recomputed == sorted(recomputed)  # from the fastest to the leanest
    assert len(set(recomputed)) == len(recomputed)
    # Each layer's output projection: 2 * 8,192 tokens * 8,192 * 6,144.
    assert recomputed[-1] - recomputed[-2] == 80 * 2 * 8192 * 8192 * 6144


def test_xla_counts_the_same_products(monkeypatch):
    """One unit of two layers is not scanned, and 32 tokens are one chunk, so XLA sees them all.

    XLA differs in three ways: it counts norms and activations too, all pairs of tokens and not
    only the causal ones, and the body of a loop once, as which experts run on CPU.
    """
    config = dataclasses.replace(
        ModelConfig.tiny(),
        layer_types=("lightning", "softmax"),
        hidden_size=256,
        intermediate_size=512,
        shared_intermediate_size=1,
    )
    length = config.head_dim

    def one_expert(rows, gate, up, down, *_):
        return (jax.nn.silu(rows @ gate[0]) * (rows @ up[0])) @ down[0]

    monkeypatch.setattr(experts, "grouped_mlp", one_expert)
    net = nnx.eval_shape(lambda: model.MiniMaxM1(config, nnx.Rngs(0), dtype=jnp.float32))
    tokens = jax.ShapeDtypeStruct((3, length), jnp.int32)

    def logits(net, tokens):
        return net.head(net.hidden(tokens)[0])

    counted = jax.jit(logits).lower(net, tokens).cost_analysis()["flops"]
    ours = flops.count_forward_flops(config, 3, length)
    causal = (length + 1) / (2 * length)
    expected = ours.total + ours.softmax * (1 / causal - 1)
    assert 1.0 < counted / expected < 1.04

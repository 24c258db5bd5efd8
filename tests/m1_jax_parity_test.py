"""The model against the independent oracle, on configurations that the golden file lacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from turns_support import take_turns

import m1_jax
from m1_jax import moe, oracle, testing
from m1_jax import params as params_lib
from m1_jax.checkpoints import params_map

LENGTH = 150  # crosses two chunks of 64 and ends inside one

# Each variant would go wrong in its own way: see "Traps" of the reference.
VARIANTS = {
    "period_2": {"attn_type_list": [0, 1, 0, 1]},
    "irregular": {"attn_type_list": [0, 1, 1, 0, 0]},
    "lightning_only": {"attn_type_list": [0, 0, 0]},
    "softmax_only": {"attn_type_list": [1, 1]},
    "six_heads": {"attn_type_list": [0, 1], "num_attention_heads": 6},
    "one_kv_head": {"attn_type_list": [0, 1], "num_key_value_heads": 1},
    "as_many_kv_heads": {"attn_type_list": [0, 1], "num_key_value_heads": 4},
    "full_rotary": {"attn_type_list": [0, 1], "rotary_dim": 32},
    "prenorm": {"attn_type_list": [0, 1], "postnorm": False},
    "top_1": {"attn_type_list": [0, 1], "num_experts_per_tok": 1},
    "top_3": {"attn_type_list": [0, 1], "num_experts_per_tok": 3},
    "shared_expert": {"attn_type_list": [0, 1], "shared_intermediate_size": 96},
    "scales": {
        "attn_type_list": [0, 1],
        "layernorm_linear_attention_alpha": 1.7,
        "layernorm_linear_attention_beta": 0.6,
        "layernorm_full_attention_alpha": 0.8,
        "layernorm_full_attention_beta": 1.3,
        "layernorm_mlp_alpha": 2.1,
        "layernorm_mlp_beta": 0.7,
    },
}


TURNS = ("six_heads", "one_kv_head", "as_many_kv_heads", "full_rotary")
OTHER_TURNS = ("prenorm", "top_1", "top_3", "scales")
EVERY_TIME = [name for name in VARIANTS if name not in TURNS + OTHER_TURNS]


@pytest.fixture(
    scope="module", params=[*EVERY_TIME, *take_turns(*TURNS), *take_turns(*OTHER_TURNS)]
)
def case(request, tmp_path_factory):
    overrides = VARIANTS[request.param]
    config = testing.tiny_config(
        num_hidden_layers=len(overrides["attn_type_list"]), vocab_size=128, **overrides
    )
    tensors = testing.random_tensors(config, seed=len(request.param))
    path = testing.write_release(tmp_path_factory.mktemp(request.param), config, tensors)
    tokens = np.random.default_rng(0).integers(0, 128, (2, LENGTH)).astype(np.int32)

    @jax.jit
    def differentiate(tensors):
        def loss(tensors):
            out = oracle.run_oracle(config, tensors, tokens)
            logp = jax.nn.log_softmax(out["logits"][:, :-1], axis=-1)
            chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)
            return -jnp.mean(chosen) + config["router_aux_loss_coef"] * out["aux_loss"], out

        return jax.grad(loss, has_aux=True)(tensors)

    as_float = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    grads, out = differentiate(as_float)
    return config, tensors, m1_jax.load(path), jnp.asarray(tokens), out, grads


def relative(got, wanted) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_forward_and_every_gradient_match_the_oracle(case):
    config, _, model, tokens, wanted, wanted_grads = case

    @jax.jit
    def ours(model):
        def loss(model):
            hidden, stats, outputs = model.trace(tokens)
            logits = model.head(hidden)
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1], axis=-1), tokens[:, 1:, None], axis=-1
            )
            aux = moe.balance_loss(stats)
            total = -jnp.mean(chosen) + config["router_aux_loss_coef"] * aux
            return total, (logits, aux, outputs)

        return jax.grad(loss, has_aux=True)(model)

    grads, (logits, aux, outputs) = ours(model)
    np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(aux, wanted["aux_loss"], rtol=1e-5)
    assert outputs.shape[0] == len(config["attn_type_list"])
    for layer, output in enumerate(outputs[:-1]):
        assert relative(output, wanted["hidden_states"][layer + 1]) < 1e-4, layer
    grads = params_lib.params_by_path(grads)
    for entry in params_map.list_tensor_entries(model.config):
        got = np.asarray(grads[entry.param_path][...][entry.index])
        got = got.T if entry.transposed else got
        assert relative(got, wanted_grads[entry.name]) < 1e-3, entry.name


def test_prefill_then_decoding_matches_the_oracle(case):
    config, _, model, tokens, wanted, _ = case
    state = model.init_state(2, LENGTH + 5)  # a cache larger than what is used
    start = LENGTH - 12
    logits, state = model.extend(tokens[:, :start], state)
    parts = [logits]
    for place in range(start, LENGTH):
        logits, state = model.extend(tokens[:, place : place + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), wanted["logits"], rtol=0, atol=2e-4)
    assert state.length.tolist() == [LENGTH, LENGTH]
    for layer, kind in enumerate(config["attn_type_list"]):
        location = model.config.locate_layer(layer)
        group_state = state.group_states[location.group]
        if kind == 0:
            got, matrix = group_state[location.stack_index], wanted["lightning_states"][layer]
            assert relative(got, matrix) < 1e-4
        else:
            for name in ("keys", "values"):
                buffer = getattr(group_state, name)
                got = jnp.moveaxis(buffer[location.stack_index][:, :, :LENGTH], 1, 2)
                assert relative(got, wanted[name][layer]) < 1e-4

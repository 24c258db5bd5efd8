"""The oracle `m1_jax.oracle` against outputs of the release's own code, and its fixtures."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tokenizers

from m1_jax import oracle, testing

_TINY = pathlib.Path(__file__).parent / "data" / "m1-tiny"
_GOLDEN = np.load(_TINY / "golden.npz")
_GRADIENTS = sorted(key.removeprefix("grad/") for key in _GOLDEN.files if key.startswith("grad/"))


def _relative(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def _read_tensors(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="np") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def release():
    config = json.loads((_TINY / "config.json").read_text())
    return config, _read_tensors(_TINY)


@pytest.fixture(scope="module")
def full(release):
    config, tensors = release
    return oracle.run_oracle(config, tensors, _GOLDEN["input_ids"])


def test_logits_are_the_release_s(full):
    got = full["logits"][:, _GOLDEN["logits_positions"]]
    np.testing.assert_allclose(got, _GOLDEN["logits"], rtol=0, atol=testing.TOLERANCES["logits"])


def test_logprobs_are_the_release_s(full):
    logprobs = jax.nn.log_softmax(full["logits"][:, :-1])
    got = jnp.take_along_axis(logprobs, _GOLDEN["input_ids"][:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        got, _GOLDEN["next_token_logprobs"], rtol=0, atol=testing.TOLERANCES["logprobs"]
    )


def test_one_pass_equals_the_release_s_decoding(full):
    start, steps = int(_GOLDEN["decode_start"]), _GOLDEN["decode_logits"].shape[1]
    np.testing.assert_allclose(
        full["logits"][:, start : start + steps],
        _GOLDEN["decode_logits"],
        rtol=0,
        atol=testing.TOLERANCES["logits"],
    )


def test_greedy_tokens_are_the_release_s(release):
    config, tensors = release
    tokens = np.concatenate([_GOLDEN["input_ids"][:, :100], _GOLDEN["greedy_tokens"]], axis=1)
    logits = oracle.run_oracle(config, tensors, tokens)["logits"]
    got = np.argmax(logits[:, 99:-1], axis=-1)
    np.testing.assert_array_equal(got, _GOLDEN["greedy_tokens"])


def test_aux_loss_is_the_release_s(full):
    assert abs(full["aux_loss"] - _GOLDEN["aux_loss"]) < testing.TOLERANCES["aux_loss"]


def test_hidden_norms_are_the_release_s(full):
    got = [np.mean(np.linalg.norm(x, axis=-1)) for x in full["hidden_states"]]
    np.testing.assert_allclose(got, _GOLDEN["hidden_norms"], rtol=testing.TOLERANCES["activations"])


def test_state_is_the_release_s(full):
    got = full["lightning_states"][int(_GOLDEN["lightning_layer"])]
    assert _relative(got, _GOLDEN["lightning_state"]) < testing.TOLERANCES["state"]


@pytest.mark.parametrize("which", ["keys", "values"])
def test_cached_keys_and_values_are_the_release_s(full, which):
    got = full[which][int(_GOLDEN["softmax_layer"])][:, -4:]
    want = _GOLDEN[f"softmax_{which[0]}_last4"]
    assert _relative(got, want) < testing.TOLERANCES["activations"]


def test_loss_and_gradients_are_the_release_s(release):
    config, tensors = release
    tokens = _GOLDEN["input_ids"][:, :320]
    named = {name: jnp.asarray(tensors[name], jnp.float32) for name in _GRADIENTS}

    @jax.jit
    def loss_and_gradients(named, tensors):
        return jax.value_and_grad(
            lambda named: oracle.oracle_loss(config, {**tensors, **named}, tokens)
        )(named)

    loss, gradients = loss_and_gradients(named, tensors)
    assert abs(loss - _GOLDEN["loss"]) < testing.TOLERANCES["loss"]
    errors = {name: _relative(gradients[name], _GOLDEN[f"grad/{name}"]) for name in _GRADIENTS}
    assert max(errors.values()) < testing.TOLERANCES["gradients"], errors


def test_documents_are_independent_and_padding_is_zero():
    config = testing.tiny_config(attn_type_list=[0, 1], num_local_experts=3)
    tensors = testing.random_tensors(config)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 12))
    segments = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [3, 3, 3, 3] + [0] * 8])
    packed = oracle.run_oracle(config, tensors, tokens, segment_ids=segments)
    alone = oracle.run_oracle(config, tensors, tokens[:1, 5:11])
    np.testing.assert_array_equal(packed["logits"][0, 5:11], alone["logits"][0])
    np.testing.assert_array_equal(packed["keys"][1][0, 5:11], alone["keys"][1][0])
    np.testing.assert_array_equal(packed["lightning_states"][0][0], alone["lightning_states"][0][0])
    assert not np.any(np.asarray(packed["logits"])[segments == 0])

    tokens[segments != 2] += 1  # Wraps nowhere: the embedding lookup clamps.
    changed = oracle.run_oracle(config, tensors, tokens, segment_ids=segments)
    np.testing.assert_array_equal(changed["logits"][0, 5:11], alone["logits"][0])


def test_one_segment_is_a_plain_row():
    config = testing.tiny_config(attn_type_list=[1, 0], num_local_experts=3)
    tensors = testing.random_tensors(config)
    tokens = np.arange(18).reshape(2, 9)
    plain = oracle.run_oracle(config, tensors, tokens)
    packed = oracle.run_oracle(config, tensors, tokens, segment_ids=np.ones((2, 9), int))
    for name in ("logits", "aux_loss"):  # Batches of one and two may be reduced in another order.
        np.testing.assert_allclose(plain[name], packed[name], rtol=0, atol=1e-5)


def test_slopes_of_heads_not_a_power_of_two():
    config = testing.tiny_config(num_attention_heads=6, num_key_value_heads=1)
    # Slopes of 4 heads, then the first and third of 8, at the first layer's factor of 1 + 1e-5.
    want = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]) * (1 + 1e-5)
    np.testing.assert_allclose(oracle.lightning_slopes(config, 0), want, rtol=1e-6)
    np.testing.assert_allclose(
        oracle.lightning_slopes(config, 3), want * (1 - 3 / 7 + 1e-5) / (1 + 1e-5), rtol=1e-6
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"attn_type_list": [1, 0, 0], "num_attention_heads": 3, "num_key_value_heads": 1},
        {"attn_type_list": [0, 1], "shared_intermediate_size": 96, "postnorm": False},
        {"attn_type_list": [0, 1], "num_experts_per_tok": 1, "rotary_dim": 32},
        {"attn_type_list": [0, 1], "num_experts_per_tok": 3},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_every_tensor_matters(overrides):
    config = testing.tiny_config(num_local_experts=4, vocab_size=32, **overrides)
    tensors = testing.random_tensors(config, seed=3)
    tokens = np.random.default_rng(2).integers(0, 32, (2, 24))
    as_float = {name: value.astype(np.float32) for name, value in tensors.items()}
    gradients = jax.jit(jax.grad(lambda t: oracle.oracle_loss(config, t, tokens)))(as_float)
    silent = [name for name, g in gradients.items() if not np.linalg.norm(g) > 1e-6]
    assert not silent
    logits = np.stack(oracle.run_oracle(config, tensors, tokens)["router_logits"])
    ranked = -np.sort(-logits, axis=-1)
    k = config["num_experts_per_tok"]
    # Float32 noise near 1e-6 must not choose another expert.
    assert np.min(ranked[..., k - 1] - ranked[..., k]) > 1e-5


def test_tiny_config_is_the_golden_s(release):
    assert testing.tiny_config() == release[0]
    assert testing.tiny_config(num_hidden_layers=4)["attn_type_list"] == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="n_heads"):
        testing.tiny_config(n_heads=4)


def test_written_release_reads_back(release, tmp_path):
    config, golden = release
    shapes = testing.tensor_shapes(config)
    assert {name: value.shape for name, value in golden.items()} == shapes
    tensors = testing.random_tensors(config)
    assert {n: v.dtype for n, v in tensors.items()} == {n: v.dtype for n, v in golden.items()}
    testing.write_release(tmp_path, config, tensors, num_shards=4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in golden.values())
    assert set(index["weight_map"].values()) == {
        f"model-0000{i}-of-00004.safetensors" for i in range(4)
    }
    for name, value in _read_tensors(tmp_path).items():
        np.testing.assert_array_equal(value, tensors[name])
        with safetensors.safe_open(tmp_path / index["weight_map"][name], "np") as shard:
            assert name in shard.keys()  # noqa: SIM118


@pytest.mark.parametrize("vocab_size", [260, 512, 2048])
def test_tiny_tokenizer(tmp_path, vocab_size):
    testing.write_tiny_tokenizer(tmp_path / "a", vocab_size)
    testing.write_tiny_tokenizer(tmp_path / "b", vocab_size)
    text = (tmp_path / "a" / "tokenizer.json").read_text()
    assert text == (tmp_path / "b" / "tokenizer.json").read_text()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    line = "<begin_of_document>Zürich 42\n\t<end_of_sentence>"
    ids = tokenizer.encode(line).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == line
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert all(
        tokenizer.token_to_id(settings[f"{kind}_token"]) >= vocab_size - 4
        for kind in ("bos", "eos", "unk")
    )
    with pytest.raises(ValueError, match="at least 260"):
        testing.write_tiny_tokenizer(tmp_path / "c", 259)

"""transformers' own `minimax`: its checkpoints load, compute the same, and load there again."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import m1_jax
from m1_jax import config as config_lib
from m1_jax import convert, testing
from m1_jax import params as params_lib
from m1_jax.checkpoints import release

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ALPHAS = {
    "linear_attn_alpha_factor": 2.5,
    "linear_attn_beta_factor": 1.25,
    "full_attn_alpha_factor": 3.5,
    "full_attn_beta_factor": 0.75,
    "mlp_alpha_factor": 1.5,
    "mlp_beta_factor": 1.125,
}
_CASES = {
    # Layers, rope and residual weights as transformers has them by default; lightning comes last.
    "defaults": {},
    "weighted": _ALPHAS | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "irregular": _ALPHAS
    | {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 3,
        "block_size": 8,
    },
}


def _build(**changes):
    """Return a model whose every path is visible in the logits; see `testing.random_tensors`."""
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**_SIZES | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" in name:
                parameter.normal_()
            else:
                parameter.normal_(
                    0, (2 if "gate.weight" in name else 1.5) / parameter.shape[-1] ** 0.5
                )
    return model


@pytest.fixture(scope="module", params=_CASES)
def native(request, tmp_path_factory):
    """A model of transformers, and the directory that it wrote."""
    model = _build(**_CASES[request.param])
    directory = tmp_path_factory.mktemp(request.param) / "native"
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 96, (2, 40)).astype(np.int32)


def _logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def _assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=testing.TOLERANCES["logits"])


def test_logits(native, tokens):
    model, directory = native
    _assert_close(m1_jax.load(directory)(tokens), _logits(model, tokens))


def test_greedy_decoding(native, tokens):
    model, directory = native
    prompt = torch.tensor(tokens[:, :9], dtype=torch.long)
    # Without a mask, transformers takes every token that equals pad_token_id for padding.
    settings = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
    wanted = model.generate(prompt, max_new_tokens=12, **settings)[:, 9:]
    ours = m1_jax.load(directory)
    logits, state = ours.extend(jnp.asarray(tokens[:, :9]), ours.init_state(2, 21))
    chosen = []
    for _ in range(12):
        chosen.append(jnp.argmax(logits[:, -1:], axis=-1))
        logits, state = ours.extend(chosen[-1], state)
    np.testing.assert_array_equal(jnp.concatenate(chosen, axis=1), wanted.numpy())


def test_conversion_and_back(native, tokens, tmp_path):
    """The weights come back byte for byte; transformers rebuilds its constants by itself."""
    model, directory = native
    for to, src, dst in (("orbax", directory, "orbax"), ("hf", tmp_path / "orbax", "back")):
        convert.run(convert.ConvertConfig(to, str(src), str(tmp_path / dst), progress=False))
    _assert_close(m1_jax.load(tmp_path / "orbax")(tokens), _logits(model, tokens))
    before, after = release.Release(directory).tensors, release.Release(tmp_path / "back").tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.read().tobytes() == after[name].read().tobytes()
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (directory / name).read_bytes()
    again = transformers.MiniMaxForCausalLM.from_pretrained(tmp_path / "back").eval()
    np.testing.assert_array_equal(_logits(again, tokens), _logits(model, tokens))


def test_several_shards(tokens, tmp_path):
    model = _build()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _assert_close(m1_jax.load(tmp_path)(tokens), _logits(model, tokens))


def test_bfloat16(tmp_path, tokens):
    """Stored constants are rounded, too; ours are computed anew in float32."""
    model = _build().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ours = m1_jax.load(tmp_path)
    # The constants go back to float32 with the rest, so they have to be made again.
    wanted = transformers.MiniMaxForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for layer in wanted.model.layers:
        if hasattr(layer.self_attn, "slope_rate"):
            slopes = layer.self_attn.get_slope_rate()
            made = (slopes, *layer.self_attn.decay_factors(slopes))
            names = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
            for name, value in zip(names, made, strict=True):
                setattr(layer.self_attn, name, torch.nn.Buffer(value))
    _assert_close(ours(tokens), _logits(wanted, tokens))


def test_float16_with_a_lightning_layer_at_the_end(tmp_path):
    """The last layer's stored decay rates are below the normal numbers of float16."""
    kinds = ["full_attention", "linear_attention"] * 2
    model = _build(layer_types=kinds).half()
    model.save_pretrained(tmp_path)
    loaded = params_lib.params_by_path(m1_jax.load(tmp_path))
    wanted = model.lm_head.weight.detach().float().numpy().T
    np.testing.assert_array_equal(np.asarray(loaded["head.kernel"][...]), wanted)


# ---- what is refused


def _edit(directory, name, edit):
    file = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    tensors[name] = edit(tensors[name])
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layer", [1, 3], ids=["layer 1", "last layer"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda slopes: slopes * np.float32(1.001 if slopes.max() > 1e-3 else 2),
        lambda slopes: -slopes,
        lambda slopes: slopes[::-1].copy(),
        lambda slopes: slopes[:3].copy(),
        lambda slopes: np.full_like(slopes, np.nan),
    ],
    ids=["scaled", "negative", "reversed", "short", "nan"],
)
def test_other_decay_rates_are_refused(tmp_path, layer, edit):
    _build().save_pretrained(tmp_path)
    name = f"model.layers.{layer}.self_attn.slope_rate"
    _edit(tmp_path, name, edit)
    wanted = rf"{name}(: got .* wanted .* layer {layer} of 4| has shape \[3, 1, 1\]; wanted \[4,)"
    with pytest.raises(release.CheckpointError, match=wanted):
        m1_jax.load(tmp_path)


def test_decay_rates_of_another_depth_are_refused(tmp_path):
    """A config.json with fewer layers than the rates were made for."""
    _build(num_hidden_layers=6).save_pretrained(tmp_path)
    file, path = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = safetensors.numpy.load_file(file)
    kept = {k: v for k, v in tensors.items() if ".layers.4." not in k and ".layers.5." not in k}
    safetensors.numpy.save_file(kept, file, metadata={"format": "pt"})
    config = json.loads(path.read_text())
    config |= {"num_hidden_layers": 4, "layer_types": config["layer_types"][:4]}
    path.write_text(json.dumps(config))
    with pytest.raises(release.CheckpointError, match="layers.1.self_attn.slope_rate"):
        m1_jax.load(tmp_path)


def test_constants_of_a_softmax_layer_are_left_over(tmp_path):
    _build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.0.self_attn.slope_rate"] = np.ones((4, 1, 1), np.float32)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(release.CheckpointError, match="1 not in the model.*layers.0.*slope_rate"):
        m1_jax.load(tmp_path)


def test_what_transformers_computes_and_we_do_not_is_refused(tmp_path):
    """Its decay rates for six heads are not the release's; yarn changes the rotation."""
    _build(num_attention_heads=6).save_pretrained(tmp_path / "heads")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    _build(rope_parameters=yarn).save_pretrained(tmp_path / "yarn")
    for name, word in (("heads", "num_attention_heads is 6"), ("yarn", "rope_type is 'yarn'")):
        with pytest.raises(config_lib.ConfigError, match=word):
            m1_jax.load(tmp_path / name)


def test_the_release_in_the_native_spelling():
    """The release's shapes and residual weights; partial rotation is ours alone."""
    m1 = config_lib.ModelConfig.m1()
    kinds = {"lightning": "linear_attention", "softmax": "full_attention"}
    written = transformers.MiniMaxConfig(
        vocab_size=m1.vocab_size,
        hidden_size=m1.hidden_size,
        intermediate_size=m1.intermediate_size,
        num_hidden_layers=80,
        layer_types=[kinds[kind] for kind in m1.layer_types],
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=32,
        max_position_embeddings=m1.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
        **{k: m1.layernorm_mlp_alpha for k in _ALPHAS if "alpha" in k},
    )
    assert config_lib.ModelConfig.from_hf(written.to_dict()) == m1
    parameters = params_lib.params_by_path(params_lib.abstract_model(m1))
    assert parameters["layers.1.attention.query.kernel"].shape == (10, 1, 6144, 8192)

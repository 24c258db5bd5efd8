"""A model on a mesh computes what it computes on one device: values, gradients, decoding."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from turns_support import take_turns

import m1_jax
from m1_jax import (
    ModelConfig,
    collectives,
    exchange_plan,
    logprobs,
    moe,
    ring_attention,
    sharding,
)
from m1_jax import params as params_lib
from m1_jax.config import LIGHTNING, SOFTMAX

SMALL = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=(LIGHTNING, SOFTMAX) * 2,
    vocab_size=128,
    initializer_range=0.2,
    shared_intermediate_size=96,
)
ROWS, LENGTH = 8, 51  # no mesh axis divides it; four devices get an odd, two an even number
PAIRS = [
    dict(zip(pair, (2, 2), strict=True)) for pair in itertools.combinations(sharding.MESH_AXES, 2)
]
MESHES = [
    *({axis: 2} for axis in sharding.MESH_AXES),
    *PAIRS,
    {"fsdp": 2, "expert": 2, "context": 2},
    {"expert": 8},
    {"context": 8},
]
SOON = MESHES[-3:]  # all axes together, and the two that move tokens: one of them each time
GOLDEN = pathlib.Path(__file__).parent / "data" / "sharding_v5p_512.json"


def name_of(sizes) -> str:
    return "x".join(f"{axis}{size}" for axis, size in sizes.items())


def layout_of(sizes, config=SMALL, mode="train"):
    num = int(np.prod(list(sizes.values())))
    return sharding.make_layout(sharding.make_mesh(sizes, jax.devices()[:num]), config, mode)


@pytest.fixture(autouse=True)
def fewer_programs():
    """Drop the programs of every test, which are large here."""
    yield
    jax.clear_caches()


@functools.cache
def one_device():
    return params_lib.random_model(SMALL, jax.random.key(0), jnp.float32)


def spread(layout, model=None):
    """Put a model's parameters on a mesh."""
    source = params_lib.params_by_path(model or one_device())
    out = params_lib.abstract_model((model or one_device()).config, jnp.float32, layout=layout)
    for name, param in params_lib.params_by_path(out).items():
        param.set_value(jax.device_put(np.asarray(source[name][...]), param.get_value().sharding))
    return out


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SMALL.vocab_size, (ROWS, LENGTH))
    segments = np.ones((ROWS, LENGTH), np.int32)
    # Documents across the shards of every context axis, holes, padding at both ends, empty shards.
    segments[0] = np.repeat([1, 2, 0, 3], [20, 3, 6, 22])
    segments[1] = np.repeat([0, 1, 2, 0], [5, 30, 10, 6])
    segments[2] = np.repeat([3, 1], [50, 1])
    segments[3, 1:] = 0
    segments[4] = np.repeat([1, 0, 1], [10, 30, 11])
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(segments)


@jax.jit
def loss_and_gradients(model, tokens, segments):
    """Return (loss, final hidden states), gradients."""

    def loss(model):
        hidden, stats = model.hidden(tokens, segments)
        logp = logprobs.token_logprobs(model, hidden, jnp.roll(tokens, -1, axis=1), 50).logp
        real = jnp.ones_like(logp) if segments is None else (segments > 0).astype(jnp.float32)
        value = -jnp.sum(logp * real) / ROWS + 0.5 * moe.balance_loss(stats)
        return value, (value, hidden, moe.dropped_share(stats))

    gradients, values = jax.grad(loss, has_aux=True)(model)
    return values, gradients


@functools.cache
def one_device_results(with_segments: bool, length: int = LENGTH):
    """Compute logits, loss and gradients of the batch on one device, once for all meshes."""
    tokens, segments = (x[:, :length] for x in batch())
    return results(one_device(), tokens, segments if with_segments else None)


def results(model, tokens, segments):
    """Return logits, loss and gradients by path, on the host."""
    logits = np.asarray(model(tokens, segments))
    (value, _, _), gradients = loss_and_gradients(model, tokens, segments)
    params = params_lib.params_by_path(gradients)
    return logits, float(value), {name: np.asarray(param[...]) for name, param in params.items()}


def compare(wanted, other, tokens, segments):
    """Hold logits to 1e-5 and gradients to 1e-4, relative, against the results of one device."""
    real = np.ones(tokens.shape, bool) if segments is None else np.asarray(segments) > 0
    logits, value, gradients = results(other, tokens, segments)
    wanted_logits, wanted_value, wanted_gradients = wanted
    assert np.isfinite(logits).all()
    error = np.max(np.abs(logits - wanted_logits)[real])
    assert error <= 1e-5 * np.max(np.abs(wanted_logits[real]))
    assert abs(wanted_value - value) <= 1e-5 * abs(wanted_value)
    for name, gradient in wanted_gradients.items():
        error = np.linalg.norm(gradients[name] - gradient)
        assert error <= 1e-4 * np.linalg.norm(gradient) + 1e-12, name


@pytest.mark.parametrize(
    "sizes",
    [
        *(pytest.param(sizes, marks=pytest.mark.long, id=name_of(sizes)) for sizes in MESHES[:-3]),
        *take_turns(*SOON, ids=map(name_of, SOON)),
    ],
)
def test_packed_rows_on_every_mesh(sizes):
    compare(one_device_results(True), spread(layout_of(sizes)), *batch())


@pytest.mark.parametrize(
    "sizes",
    take_turns({"fsdp": 2, "expert": 2, "context": 2}, {"tensor": 2, "data": 2}),
    ids=name_of,
)
def test_plain_rows(sizes):
    compare(one_device_results(False), spread(layout_of(sizes)), batch()[0], None)


@pytest.mark.parametrize("segments", take_turns(False, True))
def test_ring_attention(monkeypatch, segments):
    monkeypatch.setattr(ring_attention, "MAX_GATHER_BYTES", 0)
    monkeypatch.setattr(ring_attention, "BLOCK_TOKENS", 8)
    tokens, ids = batch()
    if segments:
        tokens, ids = tokens[:, :48], ids[:, :48]  # an even number for each device
    wanted = one_device_results(segments, tokens.shape[1])
    compare(wanted, spread(layout_of({"context": 4})), tokens, ids if segments else None)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_zigzag_gives_early_and_late_halves(devices):
    layout = layout_of({"context": devices})
    halves = jnp.arange(2 * devices)

    def local(x):
        moved = collectives.permute_zigzag(x, "length", 0)
        return moved, collectives.permute_zigzag(moved, "length", 0, inverse=True)

    spec = layout.activation_spec("length")
    moved, back = sharding.run_sharded(layout, local, (spec,), (spec, spec))(halves)
    np.testing.assert_array_equal(back, halves)
    for device, pair in enumerate(np.asarray(moved).reshape(-1, 2)):
        assert sorted(pair) == [device, 2 * devices - 1 - device]


def all_to_the_first(model):
    """Make every token choose experts 0 and 1: of equal probabilities the first are taken."""
    for name, param in params_lib.params_by_path(model).items():
        if name.endswith("moe.router"):
            param.set_value(jnp.zeros_like(param[...]))
    return model


@pytest.mark.long(tenths=range(0, 10, 2))
def test_no_token_is_dropped_where_all_choose_one_device():
    model = all_to_the_first(params_lib.random_model(SMALL, jax.random.key(1), jnp.float32))
    many = spread(layout_of({"expert": 4}), model)
    # The buffer of a device holds 1.5 shares, and 4 come: three rounds.
    assert exchange_plan.BUFFER_SLACK < 4
    compare(results(model, *batch()), many, *batch())


@pytest.mark.long(tenths=range(1, 10, 2))
def test_capacity_drops_and_says_how_much():
    model = all_to_the_first(params_lib.random_model(SMALL, jax.random.key(1), jnp.float32))
    tokens, _ = batch()

    def share(capacity):
        config = dataclasses.replace(SMALL, expert_capacity=capacity)
        many = spread(layout_of({"expert": 4}, config), model)
        many.config = config
        for layer in many.layers:
            layer.moe.expert_capacity = capacity
        (value, _, dropped), _ = loss_and_gradients(many, tokens, None)
        assert np.isfinite(value)
        return float(dropped)

    # Devices 1 to 3 get nothing; device 0 takes one share of four, and all of them at 4.
    assert share(1.0) == pytest.approx(0.75, abs=0.01)
    assert share(4.0) == 0


@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        *take_turns(
            ({"expert": 2, "tensor": 2}, "decode"),
            ({"data": 2, "context": 2}, "decode"),
            ids=["expert2xtensor2", "data2xcontext2"],
        ),
        *take_turns(
            ({"tensor": 2, "context": 4}, "prefill"),
            ({"fsdp": 2, "expert": 2, "context": 2}, "train"),
            ids=["tensor2xcontext4", "train"],
        ),
    ],
)
def test_prefill_and_decode(sizes, mode):
    one, many = one_device(), spread(layout_of(sizes, mode=mode))
    tokens, _ = batch()
    counts = jnp.asarray([31, 5, 1, 0, 31, 30, 16, 17], jnp.int32)
    states = [model.init_state(ROWS, 60) for model in (one, many)]

    def both(tokens, *arguments, **options):
        outputs = []
        for i, model in enumerate((one, many)):
            logits, states[i] = model.extend(tokens, states[i], *arguments, **options)
            outputs.append(np.asarray(logits))
        return outputs

    wanted, got = both(tokens[:, :31], counts)
    real = np.arange(31)[None] < np.asarray(counts)[:, None]
    np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=1e-4)
    for step in range(2):  # one token, then none at all for some rows
        wanted, got = both(tokens[:, 31 + step : 32 + step], None if step else counts[:] % 2)
        rows = np.ones(ROWS, bool) if step else np.asarray(counts) % 2 == 1
        np.testing.assert_allclose(got[rows], wanted[rows], rtol=0, atol=1e-4)
    wanted, got = both(tokens[:, 33:46], last_only=True)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(states[0].length, states[1].length)


def test_log_probabilities_need_no_whole_vocabulary():
    one, many = one_device(), spread(layout_of({"tensor": 2, "fsdp": 2}))
    tokens, _ = batch()

    @functools.partial(jax.jit, static_argnums=1)
    def compute(model, chunk):
        hidden, _ = model.hidden(tokens)
        return logprobs.token_logprobs(model, hidden, tokens, chunk, with_entropy=True)

    for chunk in (None, 7, 64):
        got, wanted = compute(many, chunk), compute(one, chunk)
        np.testing.assert_allclose(got.logp, wanted.logp, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.entropy, wanted.entropy, rtol=0, atol=1e-5)


def test_entropy_of_a_split_vocabulary_has_the_same_gradient():
    one, many = one_device(), spread(layout_of({"tensor": 2, "fsdp": 2}))
    tokens, _ = batch()
    hidden = np.asarray(3 * jax.jit(lambda model: model.hidden(tokens)[0])(one))  # on no device

    def gradient(model):
        def total(hidden):
            return jnp.sum(
                logprobs.token_logprobs(model, hidden, tokens, 7, with_entropy=True).entropy
            )

        return np.asarray(jax.jit(jax.grad(total))(hidden))

    got, wanted = gradient(many), gradient(one)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


# ---- meshes, and what they cannot do


def error(function, *arguments) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        function(*arguments)
    return str(caught.value)


def test_errors_name_the_axis_and_the_remedy():
    make = sharding.make_mesh
    assert "'model'" in error(make, {"model": 8})
    said = error(make, {"fsdp": 16})
    assert "fsdp=16" in said
    assert "too few" in said
    assert "-1" in said
    assert "more than that" in error(make, {"fsdp": 2})
    assert "-1 at most once" in error(make, {"fsdp": -1, "data": -1})
    assert "-1 at most once" in error(make, {"fsdp": 0})
    said = error(layout_of, {"tensor": 4})
    assert "num_key_value_heads 2" in said
    assert "tensor=4" in said
    said = error(layout_of, {"fsdp": 2}, SMALL, "decode")
    assert "fsdp=2" in said
    assert "decode" in said
    assert "expert" in said
    assert "mode" in error(layout_of, {"data": 2}, SMALL, "serve")
    odd = dataclasses.replace(SMALL, num_local_experts=6)
    assert "num_local_experts 6 cannot be split over expert=4" in error(
        layout_of, {"expert": 4}, odd
    )
    said = error(spread(layout_of({"data": 2, "expert": 2})), jnp.zeros((3, 4), jnp.int32))
    assert "3 rows" in said
    assert "multiple of 4" in said
    other = jax.make_mesh((8,), ("model",))
    assert "'model'" in error(sharding.make_layout, other, SMALL)


def test_one_size_may_be_left_open():
    assert sharding.make_mesh({"expert": 2, "fsdp": -1}).shape["fsdp"] == 4


class Device:
    """What `mesh_utils` asks of a TPU."""

    platform, device_kind = "cpu", "fake"

    def __init__(self, number, slice_index):
        self.id, self.process_index, self.slice_index = number, slice_index, slice_index

    def __repr__(self):
        return f"{self.id}"


def test_only_data_and_fsdp_cross_slices():
    devices = [Device(i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh({"data": 2, "expert": 4}, devices)
    slices = [[d.slice_index for d in row] for row in mesh.devices.reshape(2, 4)]
    assert slices == [[0] * 4, [1] * 4]
    mesh = sharding.make_mesh({"fsdp": 4, "expert": 2}, devices)
    assert [d.slice_index for d in mesh.devices.reshape(4, 2)[:, 0]] == [0, 0, 1, 1]
    assert "2 slices" in error(sharding.make_mesh, {"expert": 8}, devices)


# ---- the released model on 512 chips


def table(mode, sizes):
    """Return {parameter: [shape, spec, GiB a device in bfloat16]}."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    mesh = AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    layout = sharding.MeshLayout(mesh, mode)
    model = params_lib.abstract_model(ModelConfig.m1())
    rows = {}
    for name, param in params_lib.params_by_path(model).items():
        spec = layout.param_spec(param.get_metadata()["logical_axes"])
        axes = [(a,) if isinstance(a, str) else a or () for a in spec]
        parts = int(np.prod([mesh.shape[axis] for dim in axes for axis in dim]))
        rows[name] = [list(param.shape), [list(dim) for dim in axes], param.size // parts]
    return rows


def tables():
    return {
        "train fsdp=16 expert=32": table("train", {"fsdp": 16, "expert": 32}),
        "train fsdp=8 expert=8 context=8": table("train", {"fsdp": 8, "expert": 8, "context": 8}),
        "decode expert=32 tensor=8 data=2": table("decode", {"expert": 32, "tensor": 8, "data": 2}),
    }


def test_golden_sharding_table():
    """Update with `PYTHONPATH=. python tests/m1_jax_sharding_test.py` and read the diff."""
    assert tables() == json.loads(GOLDEN.read_text())


def test_nothing_large_is_replicated():
    for title, rows in tables().items():
        for name, (shape, spec, _) in rows.items():
            if np.prod(shape) * 2 > 2**30:
                assert any(spec), f"{title}: {name} {shape} lies whole on every device"
        if title.startswith("train"):
            total = sum(row[2] for row in rows.values())
            assert total < 1.01 * 456_089_655_296 / 512, title


def test_load_takes_a_mesh_with_some_axes(golden_dir):
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))
    one, many = m1_jax.load(golden_dir), m1_jax.load(golden_dir, mesh=mesh)
    gate = many.layers[0].moe.gate
    assert len(gate[...].sharding.device_set) == 8
    assert gate[...].addressable_shards[0].data.size * 8 == gate.size
    tokens = batch()[0][:4, :40]
    np.testing.assert_allclose(many(tokens), one(tokens), rtol=0, atol=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(tables(), indent=1) + "\n")

"""The serving forward against the model's own: any company, any cut into parts, any garbage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from turns_support import take_turns

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import sharding
from m1_jax.serving import forward, ragged_batch
from m1_jax.serving import state as state_lib

TILE, ROWS, LANES, PAGES, SLOTS = 8, 64, 8, 24, 4
LENGTH = 83
L, S = config_lib.LIGHTNING, config_lib.SOFTMAX
CONFIGS = {
    "irregular, plain residual, one KV head": {
        "layer_types": (L, S, S, L, L),
        "postnorm": False,
        "num_key_value_heads": 1,
    },
    "shared expert, all of a head rotated, 6 heads": {
        "layer_types": (L, L, S) * 2,
        "shared_intermediate_size": 24,
        "rotary_dim": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "lightning alone, 3 heads": {
        "layer_types": (L, L),
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
    "softmax alone, every expert": {"layer_types": (S, S), "num_experts_per_tok": 4},
}
IRREGULAR, SHARED = list(CONFIGS)[:2]


@functools.cache
def make(name, dtype="float32"):
    config = config_lib.ModelConfig.tiny()
    small = {"hidden_size": 32, "head_dim": 16, "rotary_dim": 8, "num_attention_heads": 4}
    small |= {"vocab_size": 64, "intermediate_size": 24, "num_local_experts": 4}
    config = dataclasses.replace(config, initializer_range=0.1, **(small | CONFIGS[name]))
    return model_lib.MiniMaxM1(config, nnx.Rngs(0), dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, donate_argnums=3)
def program(model, tokens, work, state):
    return forward.forward_ragged(model, tokens, work, state)


@dataclasses.dataclass
class Sequence:
    """Tokens with memory of their own; done: tokens in the state. logits: of those."""

    tokens: np.ndarray
    slot: int
    pages: list
    done: int = 0
    logits: list = dataclasses.field(default_factory=list)

    def take(self, logits):
        self.logits += list(np.asarray(logits))
        self.done += len(logits)


class Server:
    """A serving state, and programs of two sizes on it."""

    def __init__(self, model, chunk, garbage=0.0):
        state = state_lib.init_serving_state(model.config, SLOTS, PAGES, chunk, model.dtype)
        self.model, self.chunk = model, chunk
        self.state = jax.tree.map(lambda a: jnp.full_like(a, garbage), state)

    def prefill(self, *parts):
        """Append counts of tokens of sequences: each starts at its place in a tile."""
        tokens, positions = np.zeros(ROWS, np.int32), np.full(ROWS, -1, np.int32)
        slots, pages = np.zeros(ROWS // TILE, np.int32), np.zeros((ROWS // TILE, PAGES), np.int32)
        at, places = 0, []
        for one, count in parts:
            first = at + one.done % TILE
            places.append(np.arange(first, first + count))
            tokens[places[-1]] = one.tokens[one.done : one.done + count]
            positions[places[-1]] = np.arange(one.done, one.done + count)
            end = first + -(-(one.done % TILE + count) // TILE) * TILE - one.done % TILE
            slots[at // TILE : end // TILE] = one.slot
            pages[at // TILE : end // TILE, : len(one.pages)] = one.pages
            at = end
        logits = self._run(tokens, positions, slots, pages)
        for (one, _), place in zip(parts, places, strict=True):
            one.take(logits[place])

    def decode(self, lanes):
        """Append a token to the sequence in each lane; None leaves it empty."""
        tokens, positions = np.zeros(LANES, np.int32), np.full(LANES, -1, np.int32)
        slots, pages = np.zeros(LANES, np.int32), np.zeros((LANES, PAGES), np.int32)
        for lane, one in enumerate(lanes):
            if one is not None:
                tokens[lane], positions[lane] = one.tokens[one.done], one.done
                slots[lane], pages[lane, : len(one.pages)] = one.slot, one.pages
        logits = self._run(tokens, positions, slots, pages)
        for lane, one in enumerate(lanes):
            if one is not None:
                one.take(logits[lane : lane + 1])

    def _run(self, tokens, positions, slots, pages):
        work = ragged_batch.RaggedBatch(positions, slots, pages, TILE, 8)
        logits, self.state = program(self.model, tokens, work, self.state)
        return np.asarray(logits)


def draw(chunk, slot=1, pages=(3, 9, 1, 14, 6, 2), length=LENGTH, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 64, length).astype(np.int32)
    return Sequence(tokens, slot, list(pages)[: -(-length // chunk)])


def serve(server, one, parts, fill=()):
    """Prefill these parts, then decode to the end, in a lane with others in the rest."""
    for count in parts:
        server.prefill((one, count))
    while one.done < len(one.tokens):
        server.decode([*fill, one])
    return np.stack(one.logits)


@pytest.mark.parametrize("chunk", [16, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_the_forward_pass_and_with_extend(name, chunk):
    model, one = make(name), draw(chunk)
    server = Server(model, chunk)
    got = serve(server, one, (64,))
    want = np.asarray(model(jnp.asarray(one.tokens)[None]))[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    # The states that both leave, where a chunk border is.
    whole = LENGTH // chunk * chunk
    _, extended = model.extend(jnp.asarray(one.tokens)[None, :whole], model.init_state(1, LENGTH))
    for mine, theirs in zip(server.state.group_states, extended.group_states, strict=True):
        if isinstance(mine, state_lib.LightningSlots):
            scale = float(jnp.max(jnp.abs(theirs)))
            got, want = mine.states[:, :, one.slot], theirs[:, :, 0]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
        else:
            keys = jnp.concatenate([mine.keys[:, :, page] for page in one.pages], axis=3)
            want = theirs.keys[:, :, 0, :, :whole]
            np.testing.assert_allclose(keys[:, :, :, :whole], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (IRREGULAR, "float32"),
        *take_turns((SHARED, "bfloat16"), (SHARED, "float32")),
    ],
)
@pytest.mark.parametrize("garbage", [0.0, np.nan])
def test_cuts_and_garbage_change_no_bit(name, dtype, garbage):
    model = make(name, dtype)
    want = serve(Server(model, 16), draw(16), (64,))
    for parts in ((64, 19), (16, 40), (8, 3, 2, 30), (1,), ()):
        server = Server(model, 16, garbage)
        got = serve(server, draw(16, slot=2, pages=(5, 4, 8, 7, 24, 1)), parts)
        np.testing.assert_array_equal(got, want, err_msg=str(parts))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(IRREGULAR, "float32"), pytest.param(SHARED, "bfloat16", marks=pytest.mark.slow)],
)
def test_company_changes_no_bit(name, dtype):
    model = make(name, dtype)
    want = serve(Server(model, 16), draw(16), (64,))
    server, one = Server(model, 16, np.nan), draw(16, slot=3)
    others = [
        draw(16, slot=1, pages=(10, 11, 12, 13, 15, 16), length=90, seed=1),
        draw(16, slot=4, pages=(17, 18, 19), length=40, seed=2),
    ]
    server.prefill((others[0], 16), (one, 21), (others[1], 5))
    server.prefill((others[1], 9), (one, 27))
    while one.done < LENGTH:
        lanes = [other if other.done < len(other.tokens) else None for other in others]
        server.decode([None, lanes[0], one, lanes[1]] if one.done % 2 else [*lanes, None, one])
    np.testing.assert_array_equal(np.stack(one.logits), want)


def test_a_poisoned_neighbour_spoils_nothing_else():
    """A token whose embedding is NaN spoils its own sequence, though padding is made of it, too."""
    model = make(IRREGULAR)
    want = serve(Server(model, 16), draw(16), (64,))
    leaves, tree = jax.tree.flatten(model)
    poisoned = jax.tree.unflatten(tree, leaves)
    poisoned.embed.table[...] = model.embed.table[...].at[0].set(jnp.nan)
    one, bad = draw(16), draw(16, slot=2, pages=(10, 11, 12, 13, 15, 16), seed=1)
    one.tokens[one.tokens == 0] = 1
    bad.tokens[bad.tokens == 0], bad.tokens[17] = 1, 0
    want = serve(Server(poisoned, 16), dataclasses.replace(one, logits=[]), (64,))
    assert np.isfinite(want).all()
    server = Server(poisoned, 16)
    server.prefill((bad, 24), (one, 20))
    server.prefill((one, 12), (bad, 24))
    while one.done < LENGTH:
        server.decode([bad if bad.done < LENGTH else None, one])
    np.testing.assert_array_equal(np.stack(one.logits), want)
    finite = np.isfinite(np.stack(bad.logits)).all(axis=1)
    assert finite[:16].all()
    assert not finite[17:].any()
    # Slot and pages are as good as new for whoever comes next.
    new = draw(16, slot=2, pages=(12, 13, 10, 11, 16, 15))
    new.tokens = one.tokens
    np.testing.assert_array_equal(serve(server, new, (40,)), want)


def test_only_what_is_owned_is_written():
    server, one = Server(make(IRREGULAR), 16, np.nan), draw(16)
    serve(server, one, (30,))
    owned = {"LightningSlots": {0, one.slot}, "PagedKVCache": {0, *one.pages}}
    for layer in server.state.group_states:
        kept = set(range(layer.keys.shape[2])) - owned[type(layer).__name__]
        for array in jax.tree.leaves(layer):
            assert np.isnan(np.asarray(array)[:, :, sorted(kept)]).all()


def test_all_rows_at_a_time_agree_within_rounding():
    model, one = make(SHARED), draw(16)
    server = Server(model, 16)
    want = serve(server, one, (64,))
    positions = np.where(np.arange(ROWS) < 60, np.arange(ROWS), -1)
    pages = np.tile(np.asarray([*one.pages] + [0] * (PAGES - len(one.pages))), (ROWS // TILE, 1))
    work = ragged_batch.RaggedBatch(positions, np.full(ROWS // TILE, 1), pages, TILE, 0)
    logits, _ = program(model, one.tokens[:ROWS], work, Server(model, 16).state)
    np.testing.assert_allclose(logits[:60], want[:60], rtol=0, atol=2e-5)


def test_devices_agree_on_the_tiles_of_a_product():
    """The most tiles of any device of the batch axes: products have collectives in them."""
    layout = sharding.make_layout(
        sharding.make_mesh({"data": 2, "expert": 2, "tensor": 2}),
        config_lib.ModelConfig.tiny(),
        sharding.DECODE,
    )
    positions = np.full((4, 32), -1, np.int32)
    positions[0, :3], positions[2, 9], positions[3, 17] = 5, 0, 8

    def count(positions):
        nothing = jnp.zeros(len(positions), jnp.int32)
        work = ragged_batch.RaggedBatch(positions, nothing, nothing[:, None], TILE, 8)
        work = work.count_tiles_on_mesh()
        computed = work.map_matmul_tiles(lambda x: x + 1, jnp.zeros_like(positions))
        return work.num_matmul_tiles[None], computed

    rows = layout.activation_spec("batch")
    program = jax.jit(sharding.run_sharded(layout, count, (rows,), (rows, rows)))
    num_tiles, computed = program(positions.reshape(-1))
    np.testing.assert_array_equal(num_tiles, [3, 3, 3, 3])
    np.testing.assert_array_equal(computed.reshape(4, 32).sum(axis=1), [24, 24, 24, 24])

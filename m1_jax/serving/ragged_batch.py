"""One program's worth of tokens of several sequences, through the model and the serving state.

Rows are cut into tiles. The rows of a tile are consecutive tokens of one sequence and lie in one
chunk of the grid, so a tile reads one state and ends at most one chunk (`serving/lightning.py`),
and writes one page (`serving/softmax.py`). Prefill has full tiles; decoding has one row in each.

Exactness: with `row_tile`, every matrix product takes that many rows at a time, whatever the
number of rows (experts: see `experts.matmul_tile`), and attention always takes `tile_rows` of one
sequence. A row's numbers are then the same, to the bit, in any company, in prefill and in decoding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from m1_jax import experts, sharding
from m1_jax import state as state_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """M rows of tokens in I tiles: M / I is 1 (decoding) or `tile_rows`.

    positions: of each row in its sequence; -1 is padding. The rows of a full tile are those from a
      multiple of `tile_rows` on, in order, any of them padding.
    slots: state slot of each tile; 0 where all of it is padding.
    pages: pages of each tile's sequence, in order, at least up to the tile's own.
    tile_rows: rows that attention computes at a time; divides the chunk.
    row_tile: rows that a matrix product computes at a time, which divides M; 0 takes all, which is
      faster and not exact.
    """

    positions: Int[Array, "M"]
    slots: Int[Array, "I"]
    pages: Int[Array, "I P"]
    attention_tile: int = dataclasses.field(default=8, metadata={"static": True})
    matmul_tile: int = dataclasses.field(default=8, metadata={"static": True})

    @property
    def is_decode(self) -> bool:
        return self.positions.shape == self.slots.shape

    def to_tiles(self, x: Shaped[Array, "M *rest"]) -> Shaped[Array, "I t *rest"]:
        """Return rows by tiles of `tile_rows`, single rows at their place and zeros around."""
        number, size = self.slots.shape[0], self.attention_tile
        if not self.is_decode:
            return x.reshape(number, size, *x.shape[1:])
        here = self.positions[:, None] % size == jnp.arange(size, dtype=jnp.int32)[None]
        here = here.reshape(number, size, *(1,) * (x.ndim - 1))
        return jnp.where(here, x[:, None], jnp.zeros((), x.dtype))

    def to_rows(self, x: Shaped[Array, "I t *rest"]) -> Shaped[Array, "M *rest"]:
        """Undo `tiles`."""
        if not self.is_decode:
            return x.reshape(-1, *x.shape[2:])
        return x[jnp.arange(len(x)), self.positions % self.attention_tile]

    def map_matmul_tiles(self, function: Callable, *rows: Any) -> Any:
        """Return function(*rows) of arrays [M, ...], `row_tile` rows at a time.

        The loop's length is not known to the compiler, so that it never becomes part of what is
        around it: fused otherwise, elementwise arithmetic too would round otherwise.
        """
        return map_row_tiles(function, self.matmul_tile, self.positions >= 0, *rows)


def forward_ragged(
    model: Any,
    tokens: Int[Array, "M"],
    batch: RaggedBatch,
    state: state_lib.ServingState,
    output_rows: Int[Array, "O"] | None = None,
) -> tuple[Float[Array, "O V"], state_lib.ServingState]:
    """Append the tokens to their sequences; return float32 logits of some rows, and the state.

    rows: whose logits are wanted, -1 for none; None: all of them. On a mesh every device of the
    batch axes holds all rows; heads, experts and vocabulary are split.
    """
    layout = model.layout
    if layout is None:
        return _forward_ragged_local(model, tokens, batch, state, output_rows)
    states = state_lib.serving_state_specs(state, layout)
    nothing = jax.tree.map(lambda _: PartitionSpec(), (tokens, batch, output_rows))
    program = sharding.run_sharded(
        layout,
        _forward_ragged_local,
        (sharding.param_specs(layout, model), *nothing[:2], states, nothing[2]),
        (layout.activation_spec(None, "vocab"), states),
    )
    return program(model, tokens, batch, state, output_rows)


def _forward_ragged_local(model, tokens, batch: RaggedBatch, state, output_rows):
    output_rows = jnp.arange(len(tokens)) if output_rows is None else output_rows
    wanted = jnp.where(output_rows >= 0, batch.positions[output_rows] >= 0, False)
    with experts.matmul_tile(batch.matmul_tile):
        x = model.embed(tokens[None], model.dtype, model.layout)[0]
        x, chosen, after, _ = model.run_layers(x, batch, state.layers)
        routes = (
            None
            if state.expert_id_pages is None
            else _record_expert_ids(state.expert_id_pages, chosen, batch)
        )
        norm, head = (
            sharding.gather_params(part, model.layout, model.dtype)
            for part in (model.norm, model.head)
        )
        x = jnp.take(x, jnp.maximum(output_rows, 0), axis=0)
        logits = map_row_tiles(lambda x: head(norm(x)), batch.matmul_tile, wanted, x)
    return logits, state_lib.ServingState(after, routes)


def _record_expert_ids(
    expert_id_pages: state_lib.ExpertIdPages, expert_ids: Int[Array, "L M A"], batch: RaggedBatch
) -> state_lib.ExpertIdPages:
    """Note the experts of every real row in its page."""
    chunk, real = expert_id_pages.expert_ids.shape[3], batch.positions >= 0
    pages = jnp.repeat(batch.pages, len(real) // len(batch.slots), axis=0)
    at = jnp.maximum(batch.positions, 0)
    page = jnp.where(real, jnp.take_along_axis(pages, at[:, None] // chunk, axis=1)[:, 0], 0)
    new = jnp.moveaxis(expert_ids, 0, 1).astype(expert_id_pages.expert_ids.dtype)
    return state_lib.ExpertIdPages(expert_id_pages.expert_ids.at[0, 0, page, at % chunk].set(new))


def map_row_tiles(
    function: Callable, tile_rows: int, row_mask: Bool[Array, "M"], *rows: Any
) -> Any:
    """Return function(*rows), `size` rows at a time; 0 past the last tile with a real row."""
    if not tile_rows:
        return function(*rows)
    length, more = len(row_mask), -len(row_mask) % tile_rows
    row_mask, *padded = jax.tree.map(
        lambda a: jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))), (row_mask, *rows)
    )
    tiles = jax.tree.map(lambda a: a.reshape(-1, tile_rows, *a.shape[1:]), padded)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], tiles))
    number = len(row_mask) // tile_rows

    def tile(i, outputs):
        new = function(*jax.tree.map(lambda a: a[i], tiles))
        return jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0), outputs, new
        )

    outputs = jax.tree.map(lambda a: jnp.zeros((number, *a.shape), a.dtype), shapes)
    outputs = jax.lax.fori_loop(
        0, _count_active_tiles(row_mask.reshape(number, tile_rows)), tile, outputs
    )
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:length], outputs)


def _count_active_tiles(row_mask: Bool[Array, "I t"]) -> Int[Array, ""]:
    """Return the number of tiles up to the last one with a real row."""
    order = jnp.arange(1, len(row_mask) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(jnp.any(row_mask, axis=1), order, 0))


def scan_attention_tiles(
    function: Callable, batch: RaggedBatch, arrays: Any, state: Any
) -> tuple[Any, Any]:
    """Run out, state = function(slot, pages, places, arrays, state) for tile after tile.

    places: positions [t] of the tile's rows, -1 for padding; arrays: those of the tile. Tiles past
    the last one with a real row are left out, and their output is zero.
    """
    places = batch.to_tiles(batch.positions + 1) - 1
    mine = (batch.slots, batch.pages, places, arrays)
    shape = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], mine), state)[0]
    number = batch.slots.shape[0]

    def tile(i, carry):
        outputs, state = carry
        out, state = function(*jax.tree.map(lambda a: a[i], mine), state)
        return jax.lax.dynamic_update_index_in_dim(outputs, out, i, 0), state

    outputs = jnp.zeros((number, *shape.shape), shape.dtype)
    return jax.lax.fori_loop(0, _count_active_tiles(places >= 0), tile, (outputs, state))

"""One program's worth of tokens of several sequences, through the model and the serving state.

Rows are cut into tiles. The rows of a tile are consecutive tokens of one sequence and lie in one
chunk of the grid, so a tile reads one state and ends at most one chunk (`grid.py`), and writes one
page (`paged.py`). Prefill has full tiles; decoding has one row in each.

Exactness: with `row_tile`, every matrix product takes that many rows at a time, whatever the
number of rows (experts: see `experts.fixed_tile`), and attention always takes `tile_rows` of one
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
class Work:
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
    tile_rows: int = dataclasses.field(default=8, metadata={"static": True})
    row_tile: int = dataclasses.field(default=8, metadata={"static": True})

    @property
    def single(self) -> bool:
        return self.positions.shape == self.slots.shape

    def tiles(self, x: Shaped[Array, "M *rest"]) -> Shaped[Array, "I t *rest"]:
        """Return rows by tiles of `tile_rows`, single rows at their place and zeros around."""
        number, size = self.slots.shape[0], self.tile_rows
        if not self.single:
            return x.reshape(number, size, *x.shape[1:])
        here = self.positions[:, None] % size == jnp.arange(size, dtype=jnp.int32)[None]
        here = here.reshape(number, size, *(1,) * (x.ndim - 1))
        return jnp.where(here, x[:, None], jnp.zeros((), x.dtype))

    def rows(self, x: Shaped[Array, "I t *rest"]) -> Shaped[Array, "M *rest"]:
        """Undo `tiles`."""
        if not self.single:
            return x.reshape(-1, *x.shape[2:])
        return x[jnp.arange(len(x)), self.positions % self.tile_rows]

    def by_tiles(self, function: Callable, *rows: Any) -> Any:
        """Return function(*rows) of arrays [M, ...], `row_tile` rows at a time.

        The loop's length is not known to the compiler, so that it never becomes part of what is
        around it: fused otherwise, elementwise arithmetic too would round otherwise.
        """
        return by_tiles(function, self.row_tile, self.positions >= 0, *rows)


def serve(
    model: Any,
    tokens: Int[Array, "M"],
    work: Work,
    state: state_lib.ServingState,
    rows: Int[Array, "O"] | None = None,
) -> tuple[Float[Array, "O V"], state_lib.ServingState]:
    """Append the tokens to their sequences; return float32 logits of some rows, and the state.

    rows: whose logits are wanted, -1 for none; None: all of them. On a mesh every device of the
    batch axes holds all rows; heads, experts and vocabulary are split.
    """
    layout = model.layout
    if layout is None:
        return _serve(model, tokens, work, state, rows)
    states = state_lib.serving_specs(state, layout)
    nothing = jax.tree.map(lambda _: PartitionSpec(), (tokens, work, rows))
    program = sharding.run(
        layout,
        _serve,
        (sharding.param_specs(layout, model), *nothing[:2], states, nothing[2]),
        (layout.spec(None, "vocab"), states),
    )
    return program(model, tokens, work, state, rows)


def _serve(model, tokens, work: Work, state, rows):
    rows = jnp.arange(len(tokens)) if rows is None else rows
    wanted = jnp.where(rows >= 0, work.positions[rows] >= 0, False)
    with experts.fixed_tile(work.row_tile):
        x = model.embed(tokens[None], model.dtype, model.layout)[0]
        x, chosen, after, _ = model._run(x, work, state.layers)
        routes = None if state.routes is None else _record(state.routes, chosen, work)
        norm, head = (
            sharding.ready(part, model.layout, model.dtype) for part in (model.norm, model.head)
        )
        x = jnp.take(x, jnp.maximum(rows, 0), axis=0)
        logits = by_tiles(lambda x: head(norm(x)), work.row_tile, wanted, x)
    return logits, state_lib.ServingState(after, routes)


def _record(routes: state_lib.Routes, chosen: Int[Array, "L M A"], work: Work) -> state_lib.Routes:
    """Note the experts of every real row in its page."""
    chunk, real = routes.chosen.shape[3], work.positions >= 0
    pages = jnp.repeat(work.pages, len(real) // len(work.slots), axis=0)
    at = jnp.maximum(work.positions, 0)
    page = jnp.where(real, jnp.take_along_axis(pages, at[:, None] // chunk, axis=1)[:, 0], 0)
    new = jnp.moveaxis(chosen, 0, 1).astype(routes.chosen.dtype)
    return state_lib.Routes(routes.chosen.at[0, 0, page, at % chunk].set(new))


def by_tiles(function: Callable, size: int, real: Bool[Array, "M"], *rows: Any) -> Any:
    """Return function(*rows), `size` rows at a time; 0 past the last tile with a real row."""
    if not size:
        return function(*rows)
    length, more = len(real), -len(real) % size
    real, *padded = jax.tree.map(
        lambda a: jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))), (real, *rows)
    )
    tiles = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), padded)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], tiles))
    number = len(real) // size

    def tile(i, outputs):
        new = function(*jax.tree.map(lambda a: a[i], tiles))
        return jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, i, 0), outputs, new
        )

    outputs = jax.tree.map(lambda a: jnp.zeros((number, *a.shape), a.dtype), shapes)
    outputs = jax.lax.fori_loop(0, _count(real.reshape(number, size)), tile, outputs)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:length], outputs)


def _count(real: Bool[Array, "I t"]) -> Int[Array, ""]:
    """Return the number of tiles up to the last one with a real row."""
    order = jnp.arange(1, len(real) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(jnp.any(real, axis=1), order, 0))


def for_tiles(function: Callable, work: Work, arrays: Any, state: Any) -> tuple[Any, Any]:
    """Run out, state = function(slot, pages, places, arrays, state) for tile after tile.

    places: positions [t] of the tile's rows, -1 for padding; arrays: those of the tile. Tiles past
    the last one with a real row are left out, and their output is zero.
    """
    places = work.tiles(work.positions + 1) - 1
    mine = (work.slots, work.pages, places, arrays)
    shape = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], mine), state)[0]
    number = work.slots.shape[0]

    def tile(i, carry):
        outputs, state = carry
        out, state = function(*jax.tree.map(lambda a: a[i], mine), state)
        return jax.lax.dynamic_update_index_in_dim(outputs, out, i, 0), state

    outputs = jnp.zeros((number, *shape.shape), shape.dtype)
    return jax.lax.fori_loop(0, _count(places >= 0), tile, (outputs, state))

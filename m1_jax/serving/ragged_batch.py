"""Rows of tokens of several sequences, and the tiles in which a program computes them.

Rows are cut into tiles. The rows of a tile are consecutive tokens of one sequence, in one chunk of
its length. A tile therefore reads one state, ends at most one chunk (`serving/lightning.py`), and
writes one page (`serving/softmax.py`). Prefill has full tiles. Decoding has one row in each tile.

Exactness: attention always takes `attention_tile` rows of one sequence. With `matmul_tile`, every
matrix product takes that many rows at a time, whatever the number of rows (for experts see
`experts.matmul_tile`). A row then gets the same bits in any batch, in prefill and in decoding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from m1_jax import collectives

TILE_GROUP = 8  # tiles that `map_tile_groups` gives to one call
# Rows of a product in the engine's programs on an accelerator. Its matrix unit has 128 rows (v5e,
# v5p) or 256, and computes 8 in the time of all. Weights come from HBM, once for each tile: 64
# times in a prefill of 512 rows by 8.
ACCELERATOR_MATMUL_TILE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """M rows of tokens in I tiles: M / I is 1 (decoding) or `attention_tile` (prefill).

    Attributes:
      positions: position of each row in its sequence, from 0. -1 is padding. The rows of a full
        tile have consecutive positions from a multiple of `attention_tile` on. Any of them may be
        padding.
      slots: state slot of each tile, 0 where all of the tile is padding.
      pages: pages of each tile's sequence in order, at least up to the page of the tile itself.
      attention_tile: rows that attention computes at a time. It divides the chunk.
      matmul_tile: rows that a matrix product computes at a time. The last ones are filled up. 0
        takes all rows, which is faster and not exact.
      num_matmul_tiles: tiles that products compute. None: up to the last one with a real row.
    """

    positions: Int[Array, "M"]
    slots: Int[Array, "I"]
    pages: Int[Array, "I P"]
    attention_tile: int = dataclasses.field(default=8, metadata={"static": True})
    matmul_tile: int = dataclasses.field(default=8, metadata={"static": True})
    num_matmul_tiles: Int[Array, ""] | None = None

    @property
    def is_decode(self) -> bool:
        """Return whether each tile holds one row."""
        return self.positions.shape == self.slots.shape

    def to_tiles(self, x: Shaped[Array, "M *row"]) -> Shaped[Array, "I t *row"]:
        """Return rows by tiles of `attention_tile`. A row has the same index in its tile always.

        In decoding the other rows of a tile are zeros. So a token is computed at the same row of a
        product of the same shape as in prefill.
        """
        num_tiles, size = self.slots.shape[0], self.attention_tile
        if not self.is_decode:
            return x.reshape(num_tiles, size, *x.shape[1:])
        is_row = self.positions[:, None] % size == jnp.arange(size, dtype=jnp.int32)[None]
        is_row = is_row.reshape(num_tiles, size, *(1,) * (x.ndim - 1))
        # A select and not a product with a mask, so that NaN and infinity stay in their row.
        return jnp.where(is_row, x[:, None], jnp.zeros((), x.dtype))

    def to_rows(self, x: Shaped[Array, "I t *row"]) -> Shaped[Array, "M *row"]:
        """Undo `to_tiles`."""
        if not self.is_decode:
            return x.reshape(-1, *x.shape[2:])
        # Padding, at -1, reads the last row of its tile, and nobody reads that.
        return x[jnp.arange(len(x)), self.positions % self.attention_tile]

    def tile_positions(self) -> Int[Array, "I t"]:
        """Return the positions of each tile's rows. -1 is padding."""
        # `to_tiles` fills up with zeros. Shifted by one, they become the -1 of padding.
        return self.to_tiles(self.positions + 1) - 1

    def row_pages(self, chunk_tokens: int) -> tuple[Int[Array, "M"], Int[Array, "M"]]:
        """Return the page of each row, and the row's index in that page. Padding has page 0.

        Args:
          chunk_tokens: tokens of a page.
        """
        positions = jnp.maximum(self.positions, 0)
        row_tile = jnp.arange(len(positions), dtype=jnp.int32) // (
            len(positions) // len(self.slots)
        )
        pages = self.pages[row_tile, positions // chunk_tokens]
        return jnp.where(self.positions >= 0, pages, 0), positions % chunk_tokens

    def map_matmul_tiles(self, function: Callable, *arrays: Any) -> Any:
        """Return function(*arrays) of arrays [M, ...], `matmul_tile` rows at a time."""
        is_real = self.positions >= 0
        return map_row_tiles(
            function, self.matmul_tile, is_real, *arrays, num_tiles=self.num_matmul_tiles
        )

    def count_tiles_on_mesh(self) -> "RaggedBatch":
        """Return the batch with the most matmul tiles that any device of the batch axes computes.

        Products have collectives in them. Their groups of devices differ, and yet every device of
        the mesh must come to each collective equally often.
        """
        if not self.matmul_tile or collectives.axis_size("batch") == 1:
            return self
        num_tiles = _count_active_tiles(_cut_tiles(self.positions >= 0, self.matmul_tile))
        return dataclasses.replace(self, num_matmul_tiles=collectives.pmax(num_tiles, "batch"))


def map_row_tiles(
    function: Callable,
    tile_size: int,
    is_real: Bool[Array, "M"],
    *arrays: Any,
    num_tiles: Int[Array, ""] | None = None,
) -> Any:
    """Return function(*arrays) of arrays [M, ...], `tile_size` rows at a time.

    A loop of unknown length is not fused with its neighbours, and neither is a conditional, which
    stands for a loop over one tile. Fusion would change how elementwise arithmetic rounds, so a
    row's numbers would depend on the batch.

    Args:
      tile_size: 0 takes all rows in one call, without a loop.
      is_real: False for padding. Tiles past the last one with a real row are not computed, and
        their rows are zeros.
      num_tiles: tiles to compute, at least those. None: only those.
    """
    if not tile_size:
        return function(*arrays)
    length = len(is_real)
    is_real, *tiles = jax.tree.map(lambda a: _cut_tiles(a, tile_size), (is_real, *arrays))
    # What one tile returns, so that the buffers of all tiles can be made before the loop.
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], tiles))

    def compute(i):
        return function(*jax.tree.map(lambda a: a[i], tiles))

    num_tiles = _count_active_tiles(is_real) if num_tiles is None else num_tiles
    if len(is_real) == 1:
        # A loop would copy what it carries, several times a layer: a tenth of decoding few rows.
        # The compiler may move arithmetic out of a conditional, as it does not out of a loop.
        outputs = jax.lax.cond(
            num_tiles > 0,
            lambda: jax.lax.optimization_barrier(compute(0)),
            lambda: _make_zeros(shapes),
        )
        return jax.tree.map(lambda a: a[:length], outputs)

    # Outputs are carried and written in place. `scan` would stack them, but needs a known length.
    def compute_tile(i, outputs):
        tile_outputs = compute(i)
        return jax.tree.map(
            lambda buffer, value: jax.lax.dynamic_update_index_in_dim(buffer, value, i, 0),
            outputs,
            tile_outputs,
        )

    outputs = jax.lax.fori_loop(0, num_tiles, compute_tile, _make_zeros(shapes, len(is_real)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:length], outputs)


def _make_zeros(shapes: Any, *leading: int) -> Any:
    """Return zeros of these shapes and dtypes, with leading axes."""
    return jax.tree.map(lambda a: jnp.zeros((*leading, *a.shape), a.dtype), shapes)


def _cut_tiles(x: Shaped[Array, "M *row"], tile_size: int) -> Shaped[Array, "I t *row"]:
    """Return rows in tiles, the last one filled up with zeros."""
    padding = ((0, -len(x) % tile_size), *((0, 0),) * (x.ndim - 1))
    return jnp.pad(x, padding).reshape(-1, tile_size, *x.shape[1:])


def _count_active_tiles(is_real: Bool[Array, "I t"]) -> Int[Array, ""]:
    """Return the number of tiles up to the last one with a real row."""
    # Tiles of padding may lie between others, so tiles are numbered, not counted.
    order = jnp.arange(1, len(is_real) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(jnp.any(is_real, axis=1), order, 0))


def scan_attention_tiles(
    function: Callable, batch: RaggedBatch, arrays: Any, group_state: Any
) -> tuple[Any, Any]:
    """Run function(slot, pages, positions, arrays, group_state) for tile after tile.

    Tiles past the last one with a real row are not computed, and their output is zero.

    Args:
      function: gets the tile's slot, its sequence's pages [P], the positions [t] of its rows (-1
        for padding), its own slice of `arrays`, and the group state. It returns the tile's output
        and the new group state.
      arrays: inputs by tile, [I, t, ...].
      group_state: carried from tile to tile so that writes stay in place. A later tile of the same
        sequence reads what an earlier one wrote.
    """
    positions = batch.tile_positions()
    inputs = (batch.slots, batch.pages, positions, arrays)
    shape = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], inputs), group_state)[0]
    num_tiles = batch.slots.shape[0]

    def compute_tile(i, carry):
        outputs, group_state = carry
        out, group_state = function(*jax.tree.map(lambda a: a[i], inputs), group_state)
        return jax.lax.dynamic_update_index_in_dim(outputs, out, i, 0), group_state

    outputs = jnp.zeros((num_tiles, *shape.shape), shape.dtype)
    carry = (outputs, group_state)
    return jax.lax.fori_loop(0, _count_active_tiles(positions >= 0), compute_tile, carry)


def map_tile_groups(function: Callable, batch: RaggedBatch, arrays: Any) -> Any:
    """Return function(slots, pages, positions, arrays), `TILE_GROUP` tiles at a time.

    The number of tiles in a call is fixed. So a tile is computed in products of the same shape in
    every program, and in any company.

    Args:
      function: gets the tiles' slots [G], pages [G, P], positions [G, t] (-1 for padding), and
        their slices of `arrays`. It returns arrays [G, ...] by tile. Tiles past the last one with a
        real row may not be computed, and their outputs are zeros.
      arrays: inputs by tile, [I, t, ...].
    """
    positions = batch.tile_positions()
    num_tiles = len(positions)
    inputs = (batch.slots, batch.pages, positions, arrays)
    # A filled-up group has tiles of slot 0 and page 0. Their positions say that they are padding.
    slots, pages, grouped_positions, arrays = jax.tree.map(
        lambda x: _cut_tiles(x, TILE_GROUP), inputs
    )
    is_tile = jnp.arange(grouped_positions[..., 0].size, dtype=jnp.int32) < num_tiles
    is_tile = is_tile.reshape(*grouped_positions.shape[:2], 1)
    grouped = (slots, pages, jnp.where(is_tile, grouped_positions, -1), arrays)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], grouped))

    def compute_group(i, outputs):
        group_outputs = function(*jax.tree.map(lambda x: x[i], grouped))
        return jax.tree.map(
            lambda buffer, value: jax.lax.dynamic_update_index_in_dim(buffer, value, i, 0),
            outputs,
            group_outputs,
        )

    outputs = _make_zeros(shapes, len(pages))
    is_active = jnp.any(grouped[2] >= 0, axis=2)
    outputs = jax.lax.fori_loop(0, _count_active_tiles(is_active), compute_group, outputs)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tiles], outputs)

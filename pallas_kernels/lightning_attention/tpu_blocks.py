"""How the TPU kernels cut their arrays into blocks, and the VMEM that they ask for.

Both kernels run on a grid of (rows of the batch, head blocks, superblocks). A grid step works on
one superblock of one head block of one row.

Letters in shapes: N heads of a block, C tokens of a chunk, H width of a head.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import boundaries, tiling, tpu_chunk

COMPILER_PARAMS = pltpu.CompilerParams(
    # Superblocks of a row run in order, because the state is carried from one to the next.
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    vmem_limit_bytes=tiling.VMEM_LIMIT_BYTES,
    # The compiler's default scheduler hoists loads until registers spill. This one, which splash
    # attention calls `use_experimental_scheduler`, spills none.
    flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True},
)
# Step t of the grid's last axis -> the superblock that the step works on.
SuperblockAt = Callable[[Any], Any]


def token_block_spec(
    block_sizes: tiling.TpuBlockSizes, width: int, slices_per_head: int, superblock_at: SuperblockAt
) -> pl.BlockSpec:
    """Return the spec of an array with a row per token, [B, T, heads * slices_per_head * H].

    Args:
      block_sizes: block sizes.
      width: of a head.
      slices_per_head: 3 of the projection (q, k, v), 1 of o.
      superblock_at: which superblock a step of the grid's last axis works on.
    """
    columns = slices_per_head * block_sizes.block_heads * width
    return pl.BlockSpec(
        (1, block_sizes.superblock_tokens, columns), lambda b, h, t: (b, superblock_at(t), h)
    )


def state_block_spec(block_sizes: tiling.TpuBlockSizes, width: int) -> pl.BlockSpec:
    """Return the spec of one state a row and head, [B, heads, H, H]."""
    # The index ignores t, so the block stays in VMEM for all superblocks of a row.
    return pl.BlockSpec((1, block_sizes.block_heads, width, width), lambda b, h, t: (b, h, 0, 0))


def saved_states_spec(
    block_sizes: tiling.TpuBlockSizes, width: int, superblock_at: SuperblockAt
) -> pl.BlockSpec:
    """Return the spec of one state a superblock, [B, heads, superblocks, H, H]."""
    return pl.BlockSpec(
        (1, block_sizes.block_heads, 1, width, width),
        lambda b, h, t: (b, h, superblock_at(t), 0, 0),
    )


def boundary_table_specs(
    tables: boundaries.BoundaryTables | None,
    block_sizes: tiling.TpuBlockSizes,
    superblock_at: SuperblockAt,
) -> boundaries.BoundaryTables | None:
    """Return the specs of the boundary tables, or None where there are no boundaries.

    Args:
      tables: None or not is all that counts here.
      block_sizes: block sizes.
      superblock_at: which superblock a step of the grid's last axis works on.
    """
    if tables is None:
        return None
    chunks = block_sizes.superblock_tokens // block_sizes.chunk_tokens
    return boundaries.BoundaryTables(
        # Scalars steer branches, so they lie in SMEM. Words are read as vectors.
        chunk_scalars=pl.BlockSpec(
            (1, 1, 1, chunks),
            lambda b, h, t: (b, superblock_at(t), 0, 0),
            memory_space=pltpu.SMEM,
        ),
        token_words=pl.BlockSpec(
            (1, 1, block_sizes.superblock_tokens), lambda b, h, t: (b, 0, superblock_at(t))
        ),
    )


def per_head_buffer(block_sizes: tiling.TpuBlockSizes) -> Callable[..., Any]:
    """Return buffer(rows, columns, dtype=float32), which asks for VMEM of one such array a head."""

    def buffer(rows: int, columns: int, dtype: Any = jnp.float32) -> pl.MemoryRef:
        return pltpu.VMEM((block_sizes.block_heads, rows, columns), dtype)

    return buffer


def chunk_weight_buffers(block_sizes: tiling.TpuBlockSizes, width: int) -> Any:
    """Ask for the VMEM of `ChunkWeights`. The kernel gets the same tuple, with Refs in it."""
    buffer, size = per_head_buffer(block_sizes), block_sizes.chunk_tokens
    return tpu_chunk.ChunkWeights(
        pair_decay=buffer(size, size),
        query_ramp=buffer(size, width),
        key_ramp_t=buffer(width, size),
        forgotten_fraction=buffer(1, width),
    )

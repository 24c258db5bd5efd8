"""Software pipelining over the heads of chunks: the order in which the TPU kernels issue work.

A chunk of one head is a chain of matrix products, and each waits some hundred cycles for the
product before it. The compiler's scheduler follows program order closely. So the kernels split the
chain into stages and write the stages down interleaved: while one head waits, the next heads
compute. A stage passes its results to the next stage through VMEM scratch with one slot a head,
which also keeps the results out of the registers.

Items are (chunk, head) pairs, heads fastest. Stage i runs `leads[i]` items ahead of the last stage,
across the end of a chunk into the next chunk. What a stage prepares there is thrown away if the
next chunk turns out to hold a boundary.

With 4 heads and leads (2, 1, 0) a loop body for chunk c issues, step by step:

    stage 0: c,2    stage 1: c,1    stage 2: c,0
    stage 0: c,3    stage 1: c,2    stage 2: c,1
    stage 0: c+1,0  stage 1: c,3    stage 2: c,2
    stage 0: c+1,1  stage 1: c+1,0  stage 2: c,3
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Number of a chunk, or its position in the walk: a traced int32, or a Python number where it is
# known.
ChunkIndex = Any
# stage(chunk, head). The head is a Python number, because kernels slice lanes by it.
PipelineStage = Callable[[ChunkIndex, int], None]
# handle_boundary(chunk, scalar of the chunk)
BoundaryHandler = Callable[[ChunkIndex, jax.Array], None]


def stage_leads(num_heads: int, num_stages: int) -> tuple[int, ...]:
    """Return how many items each of two or three stages is ahead, at most what slots allow.

    An item's slots and state are free again two items after its last stage (heads may finish in
    pairs), so a stage can lead by `num_heads - 2`. Of the leads tried, 5 and 3 spill no register on
    any generation and are among the fastest.
    """
    best_leads = {2: (2, 0), 3: (5, 3, 0)}[num_stages]
    # With fewer than three heads every lead is 0, and stages of a head follow one another.
    return tuple(max(0, min(lead, num_heads - 2)) for lead in best_leads)


@dataclasses.dataclass(frozen=True)
class _StageOrder:
    """Stages written down in pipelined order.

    Attributes:
      num_chunks: chunks of the walk.
      num_heads: heads of a chunk.
      stages: stages of an item, in order.
      reverse: whether position 0 of the walk is the last chunk.
    """

    num_chunks: int
    num_heads: int
    stages: Sequence[PipelineStage]
    reverse: bool

    @property
    def staggered_stages(self) -> list[tuple[PipelineStage, int]]:
        """Each stage with its lead, in the order in which a step issues them."""
        leads = stage_leads(self.num_heads, len(self.stages))
        return list(zip(self.stages, leads, strict=True))

    def chunk_at(self, position: ChunkIndex) -> ChunkIndex:
        """Return the chunk at a position of the walk."""
        return self.num_chunks - 1 - position if self.reverse else position

    def warm_up(self, position: ChunkIndex) -> None:
        """Run the leading stages on the first heads, before a body that starts at `position`."""
        for stage, lead in self.staggered_stages:
            for head in range(lead):
                stage(self.chunk_at(position), head)

    def run_body(self, position: ChunkIndex, count: int, last: ChunkIndex) -> None:
        """Finish `count` chunks from `position`, and start on the chunk after them.

        Behind position `last` there is no chunk. The leading stages prepare `last` again, and
        nothing reads what they write.
        """
        for step in range(count * self.num_heads):
            for stage, lead in self.staggered_stages:
                offset, head = divmod(step + lead, self.num_heads)
                ahead = position + offset  # at most `count` on: a lead is shorter than a chunk
                stage(self.chunk_at(jnp.minimum(ahead, last) if offset == count else ahead), head)


def run_pipeline(
    num_chunks: int,
    num_heads: int,
    stages: Sequence[PipelineStage],
    *,
    chunks_per_loop: int = 1,
    reverse: bool = False,
    scalars: jax.Ref | None = None,
    full_scalar: int = 0,
    handle_boundary: BoundaryHandler = lambda chunk, scalar: None,
) -> None:
    """Run every stage for every head of every chunk.

    Args:
      num_chunks: chunks, a multiple of `chunks_per_loop`.
      num_heads: heads of a chunk.
      stages: two or three. All but the last may run for a chunk that is never finished, so they
        must write to slots alone.
      chunks_per_loop: chunks of one loop body. Between bodies the pipeline drains, for some 300
        cycles.
      reverse: walk the chunks from the last to the first.
      scalars: `chunk_scalars` of the superblock, [1, 1, 1, num_chunks] in SMEM. None says that all
        chunks are full.
      full_scalar: the scalar of a chunk without boundary or padding.
      handle_boundary: does all the work of any other chunk.
    """
    order = _StageOrder(num_chunks, num_heads, stages, reverse)
    num_loops = num_chunks // chunks_per_loop
    if scalars is not None:
        _run_packed(order, num_loops, chunks_per_loop, scalars, full_scalar, handle_boundary)
        return

    def run_group(group: jax.Array, _: None) -> None:
        order.run_body(group * chunks_per_loop, chunks_per_loop, num_chunks - 1)

    # One warm-up is enough: every body leaves the slots filled for the next.
    order.warm_up(0)
    jax.lax.fori_loop(0, num_loops, run_group, None)


def _run_packed(
    order: _StageOrder,
    num_loops: int,
    chunks_per_loop: int,
    scalars: jax.Ref,
    full_scalar: int,
    handle_boundary: BoundaryHandler,
) -> None:
    """Walk chunks some of which hold a boundary. Arguments as in `run_pipeline`.

    A group of full chunks runs as one body. A group with a boundary runs chunk by chunk, and the
    next full group has to warm up again: the slots it would continue from were not filled.
    """

    def scalar_at(position: ChunkIndex) -> jax.Array:
        return scalars[0, 0, 0, order.chunk_at(position)]

    def run_alone(position: jax.Array, _: None) -> None:
        scalar = scalar_at(position)
        # `last` is the position itself, so that nothing is prepared for the next chunk.

        @pl.when(scalar == full_scalar)
        def _():
            order.warm_up(position)
            order.run_body(position, 1, position)

        pl.when(scalar != full_scalar)(lambda: handle_boundary(order.chunk_at(position), scalar))

    def run_group(group: jax.Array, is_warm: jax.Array) -> jax.Array:
        first = group * chunks_per_loop
        is_full = scalar_at(first) == full_scalar
        for i in range(1, chunks_per_loop):
            is_full &= scalar_at(first + i) == full_scalar
        pl.when(is_full & ~is_warm)(lambda: order.warm_up(first))
        pl.when(is_full)(lambda: order.run_body(first, chunks_per_loop, order.num_chunks - 1))

        @pl.when(jnp.logical_not(is_full))
        def _():
            # `chunks_per_loop` is known while tracing: a group of one chunk needs no loop.
            if chunks_per_loop == 1:
                handle_boundary(order.chunk_at(first), scalar_at(first))
            else:
                jax.lax.fori_loop(first, first + chunks_per_loop, run_alone, None)

        return is_full  # whether the group left the slots filled for the next group

    jax.lax.fori_loop(0, num_loops, run_group, jnp.bool_(False))

"""Software pipelining over the heads of chunks: the order in which the TPU kernels issue work.

A chunk of one head is a chain of matrix products, each waiting some hundred cycles for the one
before it. The compiler's scheduler follows program order closely, so the kernels split the chain
into stages and write them down interleaved: while one head waits, the next ones compute. A stage
passes its results to the next through VMEM scratch with one slot a head, which also keeps them out
of the registers.

Items are (chunk, head) pairs, heads fastest. Stage i runs `leads[i]` items ahead of the last stage,
across the end of a chunk into the next one; what it prepares there is thrown away if the next chunk
turns out to hold a boundary.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

PipelineStage = Callable[[jax.Array, int], None]
BoundaryHandler = Callable[[jax.Array, jax.Array], None]


def stage_leads(num_heads: int, num_stages: int) -> tuple[int, ...]:
    """Return how many items each of two or three stages is ahead, at most what slots allow.

    An item's slots and state are free again two items after its last stage (heads may finish in
    pairs), so a stage can lead by `heads - 2`. Of the leads tried, 5 and 3 spill no register on
    any generation and are among the fastest.
    """
    wanted = {2: (2, 0), 3: (5, 3, 0)}[num_stages]
    return tuple(max(0, min(lead, num_heads - 2)) for lead in wanted)


def run_pipeline(
    num_chunks: int,
    num_heads: int,
    stages: Sequence[PipelineStage],
    *,
    chunks_per_loop: int = 1,
    reverse: bool = False,
    scalars=None,
    full_scalar: int = 0,
    handle_boundary: BoundaryHandler = lambda chunk, scalar: None,
) -> None:
    """Run every stage for every head of `num` chunks.

    Args:
      num: chunks, a multiple of `group`.
      heads: heads of a chunk.
      stages: called as stage(chunk, head); the head is a Python number.
      group: chunks of one loop body; between bodies the pipeline drains, some 300 cycles.
      reverse: walk the chunks from the last to the first.
      scalars: `boundaries.build_boundary_tables`' scalars of the chunks, [1, 1, 1, num] in SMEM;
        None says that all chunks are full.
      full: the scalar of a chunk without boundary or padding.
      boundary: called as boundary(chunk, scalar) for any other chunk.

    Stages but the last may run for a chunk that is never finished, so they write only to slots.
    """
    ahead = stage_leads(num_heads, len(stages))

    def chunk(position):
        return num_chunks - 1 - position if reverse else position

    def warm_up(position):
        for stage, lead in zip(stages, ahead, strict=True):
            for head in range(lead):
                stage(chunk(position), head)

    def body(position, count, last):
        for step in range(count * num_heads):
            for stage, lead in zip(stages, ahead, strict=True):
                offset, head = divmod(step + lead, num_heads)
                later = position + offset
                stage(chunk(jnp.minimum(later, last) if offset == count else later), head)

    if scalars is None:
        warm_up(0)
        jax.lax.fori_loop(
            0,
            num_chunks // chunks_per_loop,
            lambda g, _: body(g * chunks_per_loop, chunks_per_loop, num_chunks - 1),
            None,
        )
        return

    def scalar(position):
        return scalars[0, 0, 0, chunk(position)]

    def alone(position, _):
        value = scalar(position)

        @pl.when(value == full_scalar)
        def _():
            warm_up(position)
            body(position, 1, position)

        pl.when(value != full_scalar)(lambda: handle_boundary(chunk(position), value))

    def step(g, warm):
        first = g * chunks_per_loop
        smooth = scalar(first) == full_scalar
        for i in range(1, chunks_per_loop):
            smooth &= scalar(first + i) == full_scalar
        pl.when(smooth & ~warm)(lambda: warm_up(first))
        pl.when(smooth)(lambda: body(first, chunks_per_loop, num_chunks - 1))

        @pl.when(jnp.logical_not(smooth))
        def _():
            if chunks_per_loop == 1:
                handle_boundary(chunk(first), scalar(first))
            else:
                jax.lax.fori_loop(first, first + chunks_per_loop, alone, None)

        return smooth

    jax.lax.fori_loop(0, num_chunks // chunks_per_loop, step, jnp.bool_(False))

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

Stage = Callable[[jax.Array, int], None]
Boundary = Callable[[jax.Array, jax.Array], None]


def leads(heads: int, stages: int) -> tuple[int, ...]:
    """Return how many items each of two or three stages is ahead, at most what slots allow.

    An item's slots and state are free again two items after its last stage (heads may finish in
    pairs), so a stage can lead by `heads - 2`. Of the leads tried, 5 and 3 spill no register on
    any generation and are among the fastest.
    """
    wanted = {2: (2, 0), 3: (5, 3, 0)}[stages]
    return tuple(max(0, min(lead, heads - 2)) for lead in wanted)


def run(
    num: int,
    heads: int,
    stages: Sequence[Stage],
    *,
    group: int = 1,
    reverse: bool = False,
    scalars=None,
    full: int = 0,
    boundary: Boundary = lambda chunk, scalar: None,
) -> None:
    """Run every stage for every head of `num` chunks.

    Args:
      num: chunks, a multiple of `group`.
      heads: heads of a chunk.
      stages: called as stage(chunk, head); the head is a Python number.
      group: chunks of one loop body; between bodies the pipeline drains, some 300 cycles.
      reverse: walk the chunks from the last to the first.
      scalars: `boundaries.tables`' scalars of the chunks, [1, 1, 1, num] in SMEM; None says that
        all chunks are full.
      full: the scalar of a chunk without boundary or padding.
      boundary: called as boundary(chunk, scalar) for any other chunk.

    Stages but the last may run for a chunk that is never finished, so they write only to slots.
    """
    ahead = leads(heads, len(stages))

    def chunk(position):
        return num - 1 - position if reverse else position

    def warm_up(position):
        for stage, lead in zip(stages, ahead, strict=True):
            for head in range(lead):
                stage(chunk(position), head)

    def body(position, count, last):
        for step in range(count * heads):
            for stage, lead in zip(stages, ahead, strict=True):
                offset, head = divmod(step + lead, heads)
                later = position + offset
                stage(chunk(jnp.minimum(later, last) if offset == count else later), head)

    if scalars is None:
        warm_up(0)
        jax.lax.fori_loop(0, num // group, lambda g, _: body(g * group, group, num - 1), None)
        return

    def scalar(position):
        return scalars[0, 0, 0, chunk(position)]

    def alone(position, _):
        value = scalar(position)

        @pl.when(value == full)
        def _():
            warm_up(position)
            body(position, 1, position)

        pl.when(value != full)(lambda: boundary(chunk(position), value))

    def step(g, warm):
        first = g * group
        smooth = scalar(first) == full
        for i in range(1, group):
            smooth &= scalar(first + i) == full
        pl.when(smooth & ~warm)(lambda: warm_up(first))
        pl.when(smooth)(lambda: body(first, group, num - 1))

        @pl.when(jnp.logical_not(smooth))
        def _():
            if group == 1:
                boundary(chunk(first), scalar(first))
            else:
                jax.lax.fori_loop(first, first + group, alone, None)

        return smooth

    jax.lax.fori_loop(0, num // group, step, jnp.bool_(False))

"""Block sizes of the GPU kernels and the reasons for them.

- Chunk: 64 tokens, the rows of one warpgroup's matrix instruction.
- Part: columns of the state that one program holds in registers, [H, part] float32. It is 64 at
  H = 128 with two warpgroups, and 32 at H = 256: more would spill.
- Span: tokens that one program walks. A row is one span where batch, heads and parts alone fill the
  GPU. Otherwise a cheap pass sums the spans first.
- Stages: chunks whose loads are in flight. Two stages take 104 KiB of shared memory at H = 128 in
  bfloat16, of 227 KiB on Hopper. At H = 256 in float32 they take more than there is.
"""

import dataclasses

import jax

NUM_SMS = 132  # of an H100. Another number only shifts where rows are cut.
MIN_SPAN_TOKENS = 1024  # shorter spans would add more traffic of sums
CHUNK_TOKENS = 64
# Hopper and the Blackwell of data centres: the others have less shared memory than two stages take.
COMPUTE_CAPABILITIES = ("9", "10")


@dataclasses.dataclass(frozen=True)
class GpuBlockSizes:
    """Block sizes of one call.

    Attributes:
      chunk_tokens: tokens of a chunk.
      span_tokens: tokens of a span, whole chunks.
      part_columns: columns of the state that one program holds.
      num_warps: warps of a program. 4 make a warpgroup.
      num_stages: chunks whose loads Triton keeps in flight.
    """

    chunk_tokens: int
    span_tokens: int
    part_columns: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        if self.span_tokens % self.chunk_tokens:
            raise ValueError(
                f"span_tokens: got {self.span_tokens}; wanted a multiple of chunk_tokens "
                f"{self.chunk_tokens}"
            )


def supports_head_dim(head_dim: int, item_bytes: int) -> bool:
    """Say whether heads this wide fit the GPU here, or without one, the GPU compiled for."""
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "")
        if capability.split(".")[0] not in COMPUTE_CAPABILITIES:
            return False
    return head_dim in (64, 128) or (head_dim == 256 and item_bytes == 2)


def choose_block_sizes(batch: int, num_heads: int, head_dim: int, length: int) -> GpuBlockSizes:
    """Return the block sizes for one call.

    Args:
      batch: rows.
      num_heads: heads of a row.
      head_dim: width of a head.
      length: tokens of a row, at least one.
    """
    part_columns = min(head_dim // 2, 64 if head_dim <= 128 else 32)
    programs = batch * num_heads * (head_dim // part_columns)
    spans = 1
    # Three quarters of the GPU busy is better than a pass more. Rows that are cut make two programs
    # an SM.
    if programs < 3 * NUM_SMS // 4:
        spans = max(1, min(2 * NUM_SMS // programs, length // MIN_SPAN_TOKENS))
    chunks = -(-length // CHUNK_TOKENS)
    # Heads wider than 64 take two warpgroups, so that their part of the state fits the registers.
    return GpuBlockSizes(
        chunk_tokens=CHUNK_TOKENS,
        span_tokens=-(-chunks // spans) * CHUNK_TOKENS,
        part_columns=part_columns,
        num_warps=4 if head_dim <= 64 else 8,
    )

"""Block sizes of the TPU kernels, the reasons for them, and the VMEM they take.

- Chunk: 128 tokens, the side of the matrix unit on v5e and v5p. On v6e and tpu7x, where the side is
  256, two products of 128 laid side by side beat a chunk of 256. There is less work in C x C tiles,
  and a tile has 16 registers instead of 64.
- Chunks of a loop body: the pipeline drains between loop bodies, which costs more where the
  products are short.
- Superblock: tokens of one grid step and of one saved state. The residual has D^2 * 4 / superblock
  bytes a token and head: 64 for 1,024 tokens at D = 128.
- Heads: independent heads in one instruction stream, whose matrix products hide each other's
  latency.

docs/kernels.md, "Block sizes", has the counts behind these choices.
"""

import contextlib
import dataclasses

import jax

CHUNK_TOKENS = 128
UNROLL_CHUNKS = 4  # chunks in one loop body of the forward pass
MATRIX_UNIT_SIDES = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}
# Kernels ask for what they need of this. tpu7x has 64 MiB, the others 95 MiB or more.
VMEM_LIMIT_BYTES = 56 * 2**20
NUM_LANES = 128  # columns of a vector register
# A device's `device_kind`, and the generation that it tells. libtpu calls a v5p "TPU v5".
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
# A context of JAX and not a variable of ours: it is part of the key of jit's caches, so a program
# traced for one generation is not reused for another.
_target_generation = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class TpuBlockSizes:
    """Block sizes of one call.

    Attributes:
      chunk_tokens: tokens of a chunk.
      superblock_tokens: tokens of a superblock, whole chunks.
      block_heads: heads of a block.
      max_unroll_chunks: chunks in one loop body of the forward pass, at most.
      has_paired_products: whether two products share one pass of the matrix unit.
    """

    chunk_tokens: int
    superblock_tokens: int
    block_heads: int
    max_unroll_chunks: int = 1
    has_paired_products: bool = False

    def __post_init__(self):
        if self.superblock_tokens % self.chunk_tokens:
            raise ValueError(
                f"superblock_tokens: got {self.superblock_tokens}; wanted a multiple of "
                f"chunk_tokens {self.chunk_tokens}"
            )

    @property
    def chunks_per_loop(self) -> int:
        """Chunks in one loop body: the most up to `max_unroll_chunks` that divide a superblock."""
        chunks = self.superblock_tokens // self.chunk_tokens
        return next(n for n in range(self.max_unroll_chunks, 0, -1) if chunks % n == 0)


def compile_for(generation: str) -> contextlib.AbstractContextManager:
    """Choose block sizes for a TPU generation, whatever the device, inside a `with` block.

    This serves compiling ahead of time: `with tiling.compile_for("v6e"): jax.jit(f).trace(...)`.
    Tracing has to happen inside the block. Outside of one, `current_generation` asks the device.

    Raises:
      ValueError: a generation that is no key of `MATRIX_UNIT_SIDES`.
    """
    if generation not in MATRIX_UNIT_SIDES:
        raise ValueError(f"generation is {generation!r}; wanted one of {list(MATRIX_UNIT_SIDES)}")
    return _target_generation(generation)


def current_generation() -> str | None:
    """Name the generation of `compile_for`, else of the first device, or v5p without a TPU.

    None is a TPU that the kernels do not compile for: v2 and v3 lack products that they use, and v4
    has 16 MiB of VMEM. So is a generation that is not known yet.
    """
    if _target_generation.value is not None:
        return _target_generation.value
    if jax.default_backend() != "tpu":
        return "v5p"
    return KINDS.get(jax.devices()[0].device_kind)


def estimate_vmem_bytes(block_sizes: TpuBlockSizes, head_dim: int, item_bytes: int) -> int:
    """Return the VMEM that the backward pass takes, the larger of the two.

    Pallas keeps two of each block, one in use and one on its way. Scratch exists once.
    """
    tokens = block_sizes.superblock_tokens * block_sizes.block_heads * head_dim * item_bytes
    state = block_sizes.block_heads * head_dim**2
    chunks = block_sizes.superblock_tokens // block_sizes.chunk_tokens
    # q, k, v, do, dq, dk and dv. Then the saved state, dS of the final and of the initial state.
    blocks = 2 * (7 * tokens + 3 * 4 * state)
    # The states at the chunks, then S and dS in float32.
    states = (chunks * item_bytes + 8) * state
    square, oblong = block_sizes.chunk_tokens**2, block_sizes.chunk_tokens * head_dim
    # 8 rows for the one row of forgotten fractions: a row takes a whole sublane tile.
    weights = block_sizes.block_heads * 4 * (2 * square + 4 * oblong + 8 * head_dim)
    # Three slots [C, C] and two [H, C] in qkv's dtype, three [C, H] in float32.
    slots = block_sizes.block_heads * (item_bytes * (3 * square + 2 * oblong) + 4 * 3 * oblong)
    return blocks + states + weights + slots


def choose_block_sizes(
    num_heads: int, head_dim: int, length: int, item_bytes: int, generation: str | None = None
) -> TpuBlockSizes | None:
    """Return the block sizes for one call, or None where the kernels do not fit shapes or device.

    Args:
      num_heads: heads of the call. The heads of a block divide them.
      head_dim: width of a head.
      length: tokens of a row. A short row makes a short superblock.
      item_bytes: bytes of one element of qkv.
      generation: a key of `MATRIX_UNIT_SIDES`. None takes that of `current_generation`.
    """
    generation = generation or current_generation()
    if generation is None:
        return None
    chunk = CHUNK_TOKENS
    # Products are put side by side without moves where heads and chunks are equally wide.
    has_paired_products = (
        MATRIX_UNIT_SIDES[generation] == 2 * chunk and head_dim == chunk and item_bytes == 2
    )
    # The saved states cost 64 bytes per token and head up to D = 128, and at 256 in bfloat16.
    superblock = max(1024, head_dim**2 // (16 if item_bytes == 2 else 32))
    superblock = min(superblock, -(-max(length, 1) // chunk) * chunk)
    # The largest block of heads that fits: more heads hide more latency.
    for heads in range(min(num_heads, 8 if head_dim <= 128 else 2), 0, -1):
        # A block narrower than the array is a whole number of lanes.
        if num_heads % heads or (heads * head_dim % NUM_LANES and heads != num_heads):
            continue
        block_sizes = TpuBlockSizes(chunk, superblock, heads, UNROLL_CHUNKS, has_paired_products)
        if estimate_vmem_bytes(block_sizes, head_dim, item_bytes) <= VMEM_LIMIT_BYTES:
            return block_sizes
    return None

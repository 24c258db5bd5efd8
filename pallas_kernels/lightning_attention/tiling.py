"""Block sizes of the TPU kernels, the reasons for them, and the VMEM they take.

chunk: 128 tokens. That is the side of the matrix unit on v5e and v5p; on v6e and tpu7x, where it is
256, two products of 128 laid side by side (`wide`) beat a chunk of 256: less work in C x C tiles,
and a tile of 16 registers instead of 64. unroll: the pipeline drains between loop bodies, which
costs more where the products are short. superblock: tokens of one grid step and of one saved state:
D^2 * 4 / superblock bytes of residual per token and head, 64 for 1024 tokens at D = 128. heads:
independent heads in one instruction stream, whose matrix products hide each other's latency.
"""

import contextlib
import dataclasses

import jax

CHUNK_TOKENS = 128
UNROLL_CHUNKS = 4  # chunks in one loop body of the forward pass
MATRIX_UNIT_SIDES = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}  # sides of it
# Kernels ask for what they need of this; tpu7x has 64 MiB, the others 95 or more.
VMEM_LIMIT_BYTES = 56 * 2**20
NUM_LANES = 128
KINDS = {
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5p": "v5p",
    "v6 lite": "v6e",
    "v6e": "v6e",
    "7x": "tpu7x",
}
# Part of the key of jit's caches: a program traced for one generation is not reused for another.
_target_generation = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class TpuBlockSizes:
    """Block sizes of one call.

    chunk: tokens of a chunk.
    superblock: tokens of a superblock, whole chunks.
    heads: heads of a block.
    unroll: chunks in one loop body of the forward pass, at most.
    wide: whether two products share one pass of the matrix unit.
    """

    chunk_tokens: int
    superblock_tokens: int
    block_heads: int
    max_unroll_chunks: int = 1
    has_paired_products: bool = False

    def __post_init__(self):
        if self.superblock_tokens % self.chunk_tokens:
            raise ValueError(
                f"superblock: got {self.superblock_tokens}; wanted a multiple of chunk "
                f"{self.chunk_tokens}"
            )

    @property
    def chunks_per_loop(self) -> int:
        """Chunks in one loop body: the largest number up to `unroll` that divides a superblock."""
        chunks = self.superblock_tokens // self.chunk_tokens
        return next(n for n in range(self.max_unroll_chunks, 0, -1) if chunks % n == 0)


def compile_for(generation: str) -> contextlib.AbstractContextManager:
    """Choose block sizes for a TPU generation, whatever the device, inside a `with` block.

    For compiling ahead of time: `with tiling.compile_for("v6e"): jax.jit(f).trace(...)`. What
    counts is where tracing happens. Without it `current_generation` asks the device.

    Raises:
      ValueError: a generation that is no key of `MATRIX_UNIT_SIDES`.
    """
    if generation not in MATRIX_UNIT_SIDES:
        raise ValueError(f"generation is {generation!r}; wanted one of {list(MATRIX_UNIT_SIDES)}")
    return _target_generation(generation)


def current_generation() -> str:
    """Name the generation of `compile_for`, else of the first device; v5p where there is no TPU."""
    if _target_generation.value is not None:
        return _target_generation.value
    if jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind.lower()
        for part, name in KINDS.items():
            if part in kind:
                return name
    return "v5p"


def estimate_vmem_bytes(block_sizes: TpuBlockSizes, head_dim: int, item_bytes: int) -> int:
    """Return what the backward pass, the larger of the two, takes: blocks twice, scratch once."""
    tokens = block_sizes.superblock_tokens * block_sizes.block_heads * head_dim * item_bytes
    state = block_sizes.block_heads * head_dim**2
    chunks = block_sizes.superblock_tokens // block_sizes.chunk_tokens
    blocks = 2 * (7 * tokens + 3 * 4 * state)
    states = (chunks * item_bytes + 8) * state
    square, oblong = block_sizes.chunk_tokens**2, block_sizes.chunk_tokens * head_dim
    weights = block_sizes.block_heads * 4 * (2 * square + 4 * oblong + 8 * head_dim)
    slots = block_sizes.block_heads * (item_bytes * (3 * square + 2 * oblong) + 4 * 3 * oblong)
    return blocks + states + weights + slots


def choose_block_sizes(
    num_heads: int, head_dim: int, length: int, item_bytes: int, generation: str | None = None
) -> TpuBlockSizes | None:
    """Return the block sizes for one call, or None where the kernels do not fit.

    Args:
      num_heads: heads of the call; a block of them divides it.
      head_dim: width of a head.
      length: tokens of a row; a short row makes a short superblock.
      item_bytes: bytes of one element of qkv.
      generation: a key of `MATRIX_UNIT_SIDES`; None takes that of `current_generation`.
    """
    generation = generation or current_generation()
    chunk = CHUNK_TOKENS
    # Products are put side by side without moves where heads and chunks are equally wide.
    wide = MATRIX_UNIT_SIDES[generation] == 2 * chunk and head_dim == chunk and item_bytes == 2
    # The saved states cost 64 bytes per token and head up to D = 128, and at 256 in bfloat16.
    superblock = max(1024, head_dim**2 // (16 if item_bytes == 2 else 32))
    superblock = min(superblock, -(-max(length, 1) // chunk) * chunk)
    for heads in range(min(num_heads, 8 if head_dim <= 128 else 2), 0, -1):
        # A block narrower than the array is a whole number of lanes.
        if num_heads % heads or (heads * head_dim % NUM_LANES and heads != num_heads):
            continue
        tiling = TpuBlockSizes(chunk, superblock, heads, UNROLL_CHUNKS, wide)
        if estimate_vmem_bytes(tiling, head_dim, item_bytes) <= VMEM_LIMIT_BYTES:
            return tiling
    return None

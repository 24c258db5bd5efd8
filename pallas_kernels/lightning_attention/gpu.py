"""Lightning attention on GPU: the kernels as one differentiable function."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import boundaries, gpu_bwd, gpu_fwd, gpu_tiling


def supports_shapes(qkv: Float[Array, "B T N3H"], num_heads: int) -> bool:
    """Say whether the kernels take these shapes."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    return 0 not in qkv.shape and gpu_tiling.supports_head_dim(head_dim, qkv.dtype.itemsize)


def lightning_attention(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B T"] | None,
    initial_state: Float[Array, "B N H H"],
    *,
    block_sizes: gpu_tiling.GpuBlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"]]:
    """Run the GPU kernels. See `api.lightning_attention`.

    Precision: bfloat16 input means bfloat16 operands, float32 sums and a float32 carried state.
    What is read from the state and added to it is two bfloat16 halves, in gradients the first.
    float32 input means float32 throughout, on a GPU as three products of TF32.

    Args:
      qkv, slopes, segment_ids, initial_state: as in `api.lightning_attention`.
      block_sizes: None lets `gpu_tiling.choose_block_sizes` find them.
      interpret: run the kernels' Python on any backend, for tests.

    Raises:
      ValueError: the kernels do not take this head width, or do not run on this GPU.
    """
    batch, length, _ = qkv.shape
    num_heads, head_dim = initial_state.shape[1:3]
    if 0 in qkv.shape:
        return qkv[:, :, : num_heads * head_dim], initial_state
    if not interpret and not supports_shapes(qkv, num_heads):
        raise ValueError(
            f"GPU kernels: got {qkv.dtype} heads of {head_dim}; wanted 64, 128 or (bfloat16) 256, "
            f"on a GPU of compute capability {' or '.join(gpu_tiling.COMPUTE_CAPABILITIES)}: "
            "use implementation='chunked'"
        )
    block_sizes = block_sizes or gpu_tiling.choose_block_sizes(batch, num_heads, head_dim, length)
    # Only the tables tell the kernels that a row ends inside a chunk.
    if segment_ids is None and length % block_sizes.chunk_tokens:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    tables = None
    if segment_ids is not None:
        # Tables as if each chunk were a superblock. The GPU kernels index chunks and tokens of a
        # row, so the tables' other axes go.
        chunk = block_sizes.chunk_tokens
        tables = boundaries.build_boundary_tables(segment_ids, chunk, chunk)
        tables = boundaries.BoundaryTables(*(x.reshape(batch, -1) for x in tables))
    return _lightning_attention(block_sizes, interpret, qkv, slopes, tables, initial_state)


# Static arguments first: custom_vjp hands them to the backward rule before the others.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lightning_attention(block_sizes, interpret, qkv, slopes, tables, initial_state):
    o, final, _ = gpu_fwd.lightning_forward(
        qkv, slopes, tables, initial_state, block_sizes=block_sizes, interpret=interpret
    )
    return o, final


def _lightning_attention_fwd(block_sizes, interpret, qkv, slopes, tables, initial_state):
    o, final, sums = gpu_fwd.lightning_forward(
        qkv, slopes, tables, initial_state, block_sizes=block_sizes, interpret=interpret
    )
    # The backward kernels walk from the initial state again, so no other states are saved.
    return (o, final), (qkv, slopes, tables, initial_state, sums)


def _lightning_attention_bwd(block_sizes, interpret, residuals, cotangents):
    qkv, slopes, tables, initial_state, sums = residuals
    d_o, d_final = cotangents
    d_qkv, d_initial = gpu_bwd.lightning_backward(
        qkv,
        slopes,
        tables,
        initial_state,
        sums,
        d_o,
        d_final,
        block_sizes=block_sizes,
        interpret=interpret,
    )
    # Slopes are constants of the model, and tables are integers: neither has a gradient.
    return d_qkv, jnp.zeros_like(slopes), None, d_initial


_lightning_attention.defvjp(_lightning_attention_fwd, _lightning_attention_bwd)

"""Softmax attention of whole rows by splash attention, jax's own kernels for TPU.

Every query attends to itself and to the earlier tokens of its document. The kernels keep a block of
scores in VMEM. They compute each block that is not wholly in the future, whatever the documents.

Splash attention attends on one device to the keys of whole rows. Where the length is split over
devices, each device takes a part of the heads of whole rows instead, by an all-to-all of queries
and one of outputs (Jacobs, arXiv 2309.14509). Keys and values are gathered, which are few heads.
The ring of `ring_attention.py` needs gradients of each step's log-sum-exp, which splash attention
has none of, and so it stays in XLA (docs/why.md, "Ring attention beside splash attention").

Letters of shapes: B rows, T tokens of a row, N heads, K kv heads, G = N / K query heads of a kv
head, H the size of a head. A device of the context axis has t tokens of a row.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from m1_jax import collectives, ring_attention

LANES = 128  # blocks and heads are multiples of it
# Queries and keys of a block, the largest that a row fills. By static schedules for v5p, blocks of
# 1,024 take 0.70, 0.77 and 0.82 of the time that blocks of 512 take a pair of a query and a key (in
# the forward pass, for keys and for queries). They fit into 16 MiB of VMEM, the default.
BLOCK_TOKENS = 1024


def supports_shapes(q: Float[Array, "B t N H"], k: Float[Array, "B t K H"]) -> bool:
    """Say whether the kernels take these shapes, over the devices that split the length.

    Rows whose keys `ring_attention` would not gather are too long for it, too.
    """
    num_heads, size = q.shape[2:]
    num_kv_heads, num_devices = k.shape[2], collectives.axis_size("length")
    is_tiled = size % LANES == 0 and q.shape[1] * num_devices >= LANES
    # Each device gets whole kv heads, or a part of the query heads of one.
    splits_heads = num_heads % num_devices == 0 and (
        num_kv_heads % num_devices == 0 or num_devices % num_kv_heads == 0
    )
    gathers_keys = num_devices == 1 or ring_attention.should_gather_keys(k, num_devices)
    return is_tiled and splits_heads and gathers_keys


def attend_local_rows(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t K H"],
    segment_ids: Int[Array, "B t"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B t N H"]:
    """Run `attend_rows` on this device's part of rows, whose length the context axis may split.

    Shapes are those that `supports_shapes` allows.
    """
    axes, num_devices = collectives.mesh_axes("length"), collectives.axis_size("length")
    if num_devices == 1:
        return attend_rows(q, k, v, segment_ids, interpret=interpret)
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    # [B, t, N, H] -> [B, T, N / P, H], for P devices.
    q = collectives.all_to_all(q, axes, 2, 1)
    if num_kv_heads % num_devices == 0:
        k, v = (collectives.all_to_all(x, axes, 2, 1) for x in (k, v))
    else:
        # N / P query heads of one kv head.
        head = collectives.axis_index("length") * num_kv_heads // num_devices
        k, v = (
            jax.lax.dynamic_slice_in_dim(collectives.all_gather(x, "length", 1), head, 1, 2)
            for x in (k, v)
        )
    if segment_ids is not None:
        segment_ids = collectives.all_gather(segment_ids, "length", 1)
    assert q.shape[2] * num_devices == num_heads
    o = attend_rows(q, k, v, segment_ids, interpret=interpret)
    return collectives.all_to_all(o, axes, 1, 2)


def attend_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return softmax(q k^T / sqrt(H)) v over each query's document, up to the query itself.

    Args:
      segment_ids: number of each token's document in its row, from 0 (padding) to at most T, as in
        `ForwardContext`. None: one document a row.
      interpret: run the kernels in Pallas interpret mode on any backend, for tests.

    Precision: scores, softmax and sums are float32, and so are probabilities in the forward pass.
    The scale 1/sqrt(H) is rounded into q, in q's dtype.

    What one document holds reaches no other document, be it NaN or infinity, in no output and no
    gradient. All tokens of such a document become NaN.
    """
    block = _choose_block_tokens(q.shape[1])
    length, padding = q.shape[1], -q.shape[1] % block
    # Padding comes after every token, so no token sees it.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is None:
        return _run_kernels(block, interpret, q, k, v, None)[:, :length]
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    outputs: Any = _attend_within_documents(block, interpret, q, k, v, segment_ids)
    return outputs[:, :length]


class _CausalRows(splash.CausalMask):
    """The causal mask, with one entry for each block whose entries are all equal.

    The kernels' set-up asks a block only whether any and whether all of its entries hold. Blocks in
    full made that quadratic in the length: minutes for 128K tokens.
    """

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        (q_start, q_stop, _), (k_start, k_stop, _) = (
            part.indices(size) for part, size in zip(idx, self.shape, strict=True)
        )
        if k_stop <= q_start + 1:
            return np.ones((1, 1), bool)
        if k_start >= q_stop:
            return np.zeros((1, 1), bool)
        return super().__getitem__(idx)


def _choose_block_tokens(length: int) -> int:
    """Return the queries and keys of a block. Rows shorter than a block are one."""
    if length >= BLOCK_TOKENS:
        return BLOCK_TOKENS
    blocks = (size for size in (LANES, 2 * LANES, 4 * LANES, 8 * LANES) if size >= length)
    return next(blocks)


def _run_kernels(block: int, interpret: bool, q, k, v, segment_ids) -> Float[Array, "B T N H"]:
    length, num_heads, size = q.shape[1:]
    # The kernels have no scale of their own.
    q = (q.astype(jnp.float32) / math.sqrt(size)).astype(q.dtype)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([_CausalRows((length, length))] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )

    def attend_row(q, k, v, segment_ids):
        if segment_ids is not None:
            segment_ids = splash.SegmentIds(segment_ids, segment_ids)
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
        o: Any = kernel(q, k, v, segment_ids)  # an array, because no residuals were asked for
        return jnp.swapaxes(o, 0, 1)

    return jax.vmap(attend_row)(q, k, v, segment_ids)


# ---- documents: 0 times NaN is NaN, in the kernels' products of masked probabilities too


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_within_documents(block: int, interpret: bool, q, k, v, segment_ids) -> Any:
    """Run the kernels with documents that hold NaN or infinity taken out."""
    return _attend_within_documents_fwd(block, interpret, q, k, v, segment_ids)[0]


def _attend_within_documents_fwd(block, interpret, q, k, v, segment_ids):
    is_lost = _mark_documents(
        _has_nonfinite(q) | _has_nonfinite(k) | _has_nonfinite(v), segment_ids
    )
    q, k, v = (jnp.where(is_lost, 0, x) for x in (q, k, v))
    attend = functools.partial(_run_kernels, block, interpret, segment_ids=segment_ids)
    o, pull_back = jax.vjp(attend, q, k, v)
    return jnp.where(is_lost, jnp.nan, o), (pull_back, is_lost, segment_ids)


def _attend_within_documents_bwd(block, interpret, residuals, d_o):
    pull_back, is_lost, segment_ids = residuals
    is_lost |= _mark_documents(_has_nonfinite(d_o), segment_ids)
    gradients = pull_back(jnp.where(is_lost, 0, d_o))
    # NaN and not 0: nobody must take these gradients for good ones.
    return *(jnp.where(is_lost, jnp.nan, x) for x in gradients), None


_attend_within_documents.defvjp(_attend_within_documents_fwd, _attend_within_documents_bwd)


def _has_nonfinite(x: Float[Array, "B T N H"]) -> Bool[Array, "B T"]:
    return ~jnp.all(jnp.isfinite(x), axis=(2, 3))


def _mark_documents(
    is_marked: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> Bool[Array, "B T 1 1"]:
    """Mark all tokens of a document of which one is marked."""
    rows, length = segment_ids.shape
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    documents = jnp.zeros((rows, length + 1), bool).at[row, segment_ids].max(is_marked)
    return documents[row, segment_ids][:, :, None, None]

"""Lightning attention over a sequence whose length is split over devices.

What a span of tokens does to the state is a pair (g, S): it multiplies the incoming state by g and
adds S. So devices need no tokens of each other, only these pairs. One all-gather moves N H H floats
a device, whatever the length, and the gradient moves as many back (LASP-2, arXiv 2502.07563;
docs/kernels.md, "Spans of tokens").

With documents, a span's state is that of its last document alone. It reaches a later device only if
that document is still open there. What one document holds, be it NaN, reaches no other one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import collectives

_F32 = jnp.float32


class SpanSummary(NamedTuple):
    """What a span of tokens, a device's part of each row, adds to the state.

    Summaries of all P devices have a leading axis P.
    """

    state: Float[Array, "*P B N H H"]  # float32: what its last document adds, starting from zeros
    first_document: Int[Array, "*P B"]  # number of its first document; 0 without a real token
    last_document: Int[Array, "*P B"]  # number of its last document; 0 without a real token
    num_tokens: Int[Array, "*P B"]  # real tokens


def attend_sharded_length(
    kernel: Callable,
    qkv: Float[Array, "B t N3H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B t"] | None,
    state: Float[Array, "B N H H"] | None,
) -> tuple[Float[Array, "B t NH"], Float[Array, "B N H H"]]:
    """Run `kernel`, an `api.lightning_attention`, on this device's part of each row.

    Args:
      kernel: called as kernel(qkv, slopes, segment_ids=, initial_state=).
      qkv: tokens of this device, which follow those of the device before.
      segment_ids: document numbers in the full row, which never fall. 0 is padding. None: the row
        is one document without padding.
      state: state of the row's first document before the row, the same on all devices. None: zeros.

    Returns:
      (o of this device's tokens, the state after the full row, the same on all devices).
    """
    num_devices = collectives.axis_size("length")
    if num_devices == 1:
        return kernel(qkv, slopes, segment_ids=segment_ids, initial_state=state)
    this_device = collectives.axis_index("length")
    heads = qkv.reshape(*qkv.shape[:2], slopes.shape[0], 3, -1)
    own_span = _summarize_span(heads[:, :, :, 1], heads[:, :, :, 2], slopes, segment_ids)
    spans = SpanSummary(*(collectives.all_gather_stacked(x, "length") for x in own_span))
    states, last_documents, lengths = spans.state, spans.last_document, spans.num_tokens
    # The document that is open where a device's tokens begin. Before the row it is number 1. A
    # device of padding alone has number 0 last, so the running maximum passes over it.
    previous = jnp.concatenate(
        [
            jnp.ones_like(last_documents[:1]),
            jnp.maximum(jax.lax.cummax(last_documents), 1)[:-1],
        ]
    )
    open_document = jnp.where(spans.first_document > 0, spans.first_document, previous)
    if state is not None:
        # The incoming state is one more span, of document 1 and without length, before the others.
        states = jnp.concatenate([state[None], states])
        last_documents = jnp.concatenate([jnp.ones_like(last_documents[:1]), last_documents])
        lengths = jnp.concatenate([jnp.zeros_like(lengths[:1]), lengths])
    # Tokens between the end of each span and the start of this device. If the document is the same
    # at both ends, all of them belong to it, and each of them decays the state once.
    ends = jnp.cumsum(lengths, axis=0)
    span_index = this_device + (0 if state is None else 1)  # of this device's own span
    gap = (ends[span_index] - lengths[span_index])[None] - ends
    is_open_here = last_documents == open_document[this_device][None]
    is_earlier = jnp.arange(last_documents.shape[0]) < span_index
    reaches_here = is_open_here & is_earlier[:, None]
    steps = jnp.where(reaches_here, gap, 0).astype(_F32)[:, :, None]
    weight = jnp.where(reaches_here[:, :, None], jnp.exp(-slopes[None, None] * steps), 0)
    # A select beside the product with 0: what another document left may be NaN or infinite.
    reaching = jnp.where(reaches_here[:, :, None, None, None], states, 0)
    carry = jnp.sum(reaching * weight[..., None, None], axis=0)
    o, state_after = kernel(qkv, slopes, segment_ids=segment_ids, initial_state=carry)
    # The last device alone knows the state after the row, and the sum brings it to all.
    final = jnp.where(this_device == num_devices - 1, state_after, 0)
    return o, collectives.psum(final, "length")


def _summarize_span(
    k: Float[Array, "B t N H"],
    v: Float[Array, "B t N H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B t"] | None,
) -> SpanSummary:
    """Return what these tokens alone add to the state.

    Precision: as in the kernels, k is weighted in float32 and rounded to its dtype once.
    """
    batch, length = k.shape[:2]
    # `num_after` counts the real tokens after each token: so often its product decays by the end.
    if segment_ids is None:
        ones = jnp.ones((batch,), jnp.int32)
        num_after = jnp.broadcast_to(jnp.arange(length - 1, -1, -1, dtype=_F32), (batch, length))
        first_document, last_document, num_tokens = ones, ones, ones * length
        is_last_document = None
    else:
        is_token = segment_ids > 0
        last_document = jnp.max(segment_ids, axis=1)
        # Padding must not be the minimum, so it counts as the largest number.
        numbers = jnp.where(is_token, segment_ids, jnp.iinfo(jnp.int32).max)
        first_document = jnp.min(numbers, axis=1)
        first_document = jnp.where(last_document > 0, first_document, 0)
        num_tokens = jnp.sum(is_token, axis=1, dtype=jnp.int32)
        num_after = num_tokens[:, None] - jnp.cumsum(is_token, axis=1, dtype=jnp.int32)
        num_after = num_after.astype(_F32)
        is_last_document = is_token & (segment_ids == last_document[:, None])
    ramp = jnp.exp(-num_after[:, :, None] * slopes[None, None])
    weighted = k.astype(_F32) * ramp[..., None]
    if is_last_document is not None:
        # Selects and not products with a mask, so that NaN in padding spreads nowhere.
        weighted = jnp.where(is_last_document[:, :, None, None], weighted, 0)
        v = jnp.where(is_last_document[:, :, None, None], v, 0)
    state = jnp.einsum(
        "btnk,btnv->bnkv",
        weighted.astype(k.dtype),
        v,
        precision=jax.lax.Precision.HIGHEST if k.dtype == _F32 else None,
        preferred_element_type=_F32,
    )
    return SpanSummary(state, first_document, last_document, num_tokens)

"""Log-probabilities of given tokens without the logits of a whole sequence in memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import layers, sharding
from m1_jax import model as model_lib

LOGITS = 2**27  # float32 logits alive at once on a device: 512 MiB


def token_logprobs(
    model: model_lib.MiniMaxM1,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk_vocab: int | None = None,
    normalizers: bool = False,
) -> Any:
    """Return log softmax(head(hidden))[target] for every token: [B, T] float32.

    With `normalizers`, return (those, the log of each softmax's sum [B, T] float32).

    Logits exist for `chunk_vocab` words at a time (None: as many as make `LOGITS`), in the
    backward pass too, which computes them again. Chunks of words, not of tokens: so a device that
    holds a piece of the head gathers each part of it once. `hidden` is the output of the model's
    final norm.
    """
    layout, length = model.layout, hidden.shape[1]
    local = functools.partial(_local, chunk_vocab=chunk_vocab, layout=layout)
    if layout is None:
        logps, sums = local(model.head, hidden, targets)
        return (logps, sums) if normalizers else logps
    sharding.check_rows(layout, hidden.shape[0])
    more = -length % layout.size("length")
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, more)))
    tokens = layout.spec("batch", "length")
    program = sharding.run(
        layout,
        local,
        (sharding.param_specs(layout, model.head), layout.spec("batch", "length", None), tokens),
        (tokens, tokens),
    )
    logps, sums = (x[:, :length] for x in program(model.head, hidden, targets))
    return (logps, sums) if normalizers else logps


def _local(head: layers.Head, hidden, targets, *, chunk_vocab, layout):
    x, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    words = head.kernel.shape[-1]
    ids = ids - sharding.index("vocab") * words
    chunk_vocab = min(chunk_vocab or _chunk(words, max(LOGITS // x.shape[0], 1)), words)
    # Float32, so that the gradients of all chunks add up in float32.
    x32 = x.astype(jnp.float32)

    @jax.checkpoint
    def chunk(carry, x32, kernel, start):
        top, total, chosen = carry
        part = sharding.ready(_with_kernel(head, kernel), layout, x.dtype)
        logits = part(x32.astype(x.dtype))
        higher = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(logits - higher[:, None]), -1)
        place, size = ids - start, kernel.shape[1]
        here = (place >= 0) & (place < size)
        picked = jnp.take_along_axis(logits, jnp.where(here, place, 0)[:, None], axis=-1)[:, 0]
        return higher, total, chosen + jnp.where(here, picked, 0)

    zeros = jnp.zeros(ids.shape, jnp.float32)
    carry = (jnp.full(ids.shape, -jnp.inf, jnp.float32), zeros, zeros)
    kernel = head.kernel[...]
    full = words // chunk_vocab * chunk_vocab
    if full > chunk_vocab:
        parts = jnp.moveaxis(kernel[:, :full].reshape(kernel.shape[0], -1, chunk_vocab), 1, 0)
        starts = jnp.arange(parts.shape[0], dtype=jnp.int32) * chunk_vocab
        carry, _ = jax.lax.scan(
            lambda carry, xs: (chunk(carry, x32, *xs), None), carry, (parts, starts)
        )
        kernel = kernel[:, full:]
    else:
        full = 0
    if kernel.shape[1]:
        carry = chunk(carry, x32, kernel, full)
    top, total, chosen = carry
    highest = sharding.largest(jax.lax.stop_gradient(top), "vocab")
    total = sharding.total(total * jnp.exp(top - highest), "vocab")
    sums = highest + jnp.log(total)
    logps = sharding.total(chosen, "vocab") - highest - jnp.log(total)
    return logps.reshape(targets.shape), sums.reshape(targets.shape)


def _chunk(words: int, limit: int) -> int:
    """Return the size of chunks up to a limit: equal ones where twice as many at most suffice."""
    least = -(-words // limit)
    return words // next((n for n in range(least, 2 * least) if words % n == 0), least)


def _with_kernel(head: layers.Head, kernel) -> layers.Head:
    return jax.tree.map(
        lambda param: param.replace(kernel),
        head,
        is_leaf=lambda node: isinstance(node, nnx.Param),
    )

"""Log-probabilities of given tokens without the logits of a whole sequence in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import layers

LOGITS = 2**27  # float32 logits alive at once: 512 MiB, 670 tokens of the release


def token_logprobs(
    head: layers.Head,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk_tokens: int | None = None,
) -> Float[Array, "B T"]:
    """Return log softmax(head(hidden))[target] for every token, in float32.

    Logits exist for `chunk_tokens` tokens at a time (None: as many as make `LOGITS`), in the
    backward pass too, which computes them again. A sequence that fits one chunk keeps them.
    `hidden` is the output of the model's final norm.
    """
    x, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    chunk_tokens = chunk_tokens or max(LOGITS // head.kernel.shape[-1], 1)

    def chunk(xs):
        x, ids = xs
        logits = head(x)
        chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    if x.shape[0] <= chunk_tokens:
        return chunk((x, ids)).reshape(targets.shape)
    chunk = jax.checkpoint(chunk)
    full = x.shape[0] // chunk_tokens * chunk_tokens
    parts = []
    split = (x[:full].reshape(-1, chunk_tokens, x.shape[1]), ids[:full].reshape(-1, chunk_tokens))
    parts.append(jax.lax.map(chunk, split).reshape(-1))
    if full < x.shape[0]:
        parts.append(chunk((x[full:], ids[full:])))
    return jnp.concatenate(parts).reshape(targets.shape)

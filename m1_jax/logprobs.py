"""Log-probabilities of given tokens without the logits of a whole sequence in memory.

With logits l_w over the words w, a target y and m = max_w l_w:

    Z = sum_w exp(l_w - m)
    log p(y) = l_y - m - log Z
    entropy = log Z - (sum_w exp(l_w - m) (l_w - m)) / Z

All of these are sums over words. They are accumulated chunk by chunk of the vocabulary, and then
added up over the devices that share it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import collectives, fsdp, layers, sharding
from m1_jax import model as model_lib

TILE_LANES = 128  # a TPU's arrays lie in tiles of so many columns
# Of the words that fill up the last chunk. exp(logit - highest) is 0, and no product of it is NaN,
# as -inf would make.
_PADDING_LOGIT = -1e30
MAX_LIVE_LOGITS = 2**27  # float32 logits alive at once on a device: 512 MiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Measures of every token, [B, T] float32.

    Attributes:
      logp: log-probability of the target.
      log_normalizer: log of the softmax's denominator, m + log Z. The z-loss is made from it.
      entropy: entropy of the distribution over the whole vocabulary, -sum p log p, at least 0. None
        unless it was asked for.
    """

    # Any, since JAX puts placeholders into pytrees, which shape checks would refuse.
    logp: Any
    log_normalizer: Any
    entropy: Any = None


def token_logprobs(
    model: model_lib.MiniMaxM1,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    vocab_chunk_size: int | None = None,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> TokenLogprobs:
    """Return log softmax(head(hidden) / temperature)[target] for every token: [B, T] float32.

    Logits exist for one chunk of the vocabulary at a time. The backward pass recomputes them, chunk
    by chunk. A chunk is a range of words, not of tokens, so a device that stores a shard of the
    head gathers each part of it once.

    Args:
      model: the model whose head and layout are used.
      hidden: output of the model's final norm.
      targets: the token that each position predicts.
      vocab_chunk_size: words of a chunk. None: at most as many as make `MAX_LIVE_LOGITS` on a
        device.
      with_entropy: also return the entropies, which are exact and have gradients.
      temperature: the temperature that the tokens were sampled with, more than 0.

    Raises:
      ValueError: a temperature that is not more than 0.
    """
    # `not >` and not `<=`, so that NaN is refused, too.
    if not temperature > 0:
        raise ValueError(
            f"temperature: got {temperature}; wanted more than 0. Greedy tokens have no "
            "distribution to be trained on; sample with a temperature."
        )
    layout, length = model.layout, hidden.shape[1]
    local = functools.partial(
        _local_logprobs,
        vocab_chunk_size=vocab_chunk_size,
        layout=layout,
        with_entropy=with_entropy,
        temperature=temperature,
    )
    if layout is None:
        return local(model.head, hidden, targets)
    sharding.check_batch_rows(layout, hidden.shape[0])
    # shard_map needs equal shards. The padding's log-probabilities are cut off below.
    padding = -length % layout.axis_size("length")
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    head_specs = sharding.param_specs(layout, model.head)
    hidden_spec = layout.activation_spec("batch", "length", None)
    token_spec = layout.activation_spec("batch", "length")
    program = sharding.run_sharded(layout, local, (head_specs, hidden_spec, token_spec), token_spec)
    return jax.tree.map(lambda x: x[:, :length], program(model.head, hidden, targets))


def _local_logprobs(
    head: layers.Head,
    hidden: Float[Array, "b t D"],
    targets: Int[Array, "b t"],
    *,
    vocab_chunk_size: int | None,
    layout: sharding.MeshLayout | None,
    with_entropy: bool,
    temperature: float,
) -> TokenLogprobs:
    """Accumulate one device's tokens over its shard of the vocabulary, then join the shards."""
    x, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    words = head.kernel.shape[-1]  # the words of this device's shard
    # Ids count from the shard's first word, so targets of other shards fall outside of [0, words).
    ids = ids - collectives.axis_index("vocab") * words
    if vocab_chunk_size is None:
        vocab_chunk_size = _choose_chunk_size(words, max(MAX_LIVE_LOGITS // x.shape[0], 1))
    else:
        vocab_chunk_size = min(vocab_chunk_size, words)
    num_chunks = -(-words // vocab_chunk_size)
    num_padding_words = num_chunks * vocab_chunk_size - words
    if num_padding_words:
        # A target of the next shards must not be found among the words that fill up the last chunk.
        ids = jnp.where(ids < words, ids, -1)
    # The chunks' gradients of x are added in the dtype of this array, so it is float32.
    x32 = x.astype(jnp.float32)

    # Rematerialised: residuals of every chunk would together be all logits at once.
    @jax.checkpoint
    def accumulate_chunk(carry, x32, kernel, start):
        chunk_head = fsdp.gather_params(_replace_kernel(head, kernel), layout, x.dtype)
        logits = chunk_head(x32.astype(x.dtype))  # [tokens, words of a chunk] float32
        # Python numbers: a temperature of 1 and no padding add no operation to the program.
        if temperature != 1:
            logits = logits / temperature
        if num_padding_words:
            is_word = start + jnp.arange(vocab_chunk_size, dtype=jnp.int32) < words
            logits = jnp.where(is_word, logits, _PADDING_LOGIT)
        return _accumulate_logits(carry, logits, ids - start)

    zeros = jnp.zeros(ids.shape, jnp.float32)
    moment = zeros if with_entropy else None
    # (highest logit, sum of exponentials, target's logit, moment), each [tokens].
    carry = (jnp.full(ids.shape, -jnp.inf, jnp.float32), zeros, zeros, moment)
    kernel = jnp.pad(head.kernel[...], ((0, 0), (0, num_padding_words)))
    # A single chunk needs no scan.
    if num_chunks == 1:
        carry = accumulate_chunk(carry, x32, kernel, 0)
    else:
        chunks = kernel.reshape(kernel.shape[0], num_chunks, vocab_chunk_size)
        chunks = jnp.moveaxis(chunks, 1, 0)  # [chunks, D, words of a chunk]
        starts = jnp.arange(num_chunks, dtype=jnp.int32) * vocab_chunk_size
        carry, _ = jax.lax.scan(
            lambda carry, xs: (accumulate_chunk(carry, x32, *xs), None), carry, (chunks, starts)
        )
    return jax.tree.map(lambda x: x.reshape(targets.shape), _join_vocab_shards(carry))


def _join_vocab_shards(carry) -> TokenLogprobs:
    """Return the measures of [tokens], from what each shard of the vocabulary accumulated."""
    top, total, target_logit, moment = carry
    # Every sum is taken relative to the highest logit of all shards. The results do not depend on
    # this reference, so it needs no gradient (and pmax has none).
    highest = collectives.pmax(jax.lax.stop_gradient(top), "vocab")
    moment = _shift_moment(moment, total, top, highest)
    total = collectives.psum(total * jnp.exp(top - highest), "vocab")
    return TokenLogprobs(
        # The target lies in one shard. The others add 0.
        collectives.psum(target_logit, "vocab") - highest - jnp.log(total),
        highest + jnp.log(total),
        None if moment is None else jnp.log(total) - collectives.psum(moment, "vocab") / total,
    )


def _accumulate_logits(carry, logits: Float[Array, "tokens words"], target_index):
    """Add more words to (highest logit, sum of e = exp(logit - highest), target logit, moment).

    The moment is the sum of e * (logit - highest), for the entropy, or None. `target_index` counts
    from the first of these words. A target outside of them leaves its logit unchanged.
    """
    top, total, target_logit, moment = carry
    # Without a gradient, because results do not depend on the reference of the sums.
    new_top = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    moment = _shift_moment(moment, total, top, new_top)
    shifted_logits = logits - new_top[:, None]
    total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(shifted_logits), -1)
    if moment is not None:
        moment += jnp.sum(jnp.exp(shifted_logits) * shifted_logits, -1)
    is_inside = (target_index >= 0) & (target_index < logits.shape[1])
    # An index outside would be clamped or wrapped. Its value is dropped below.
    safe_index = jnp.where(is_inside, target_index, 0)[:, None]
    picked_logits = jnp.take_along_axis(logits, safe_index, axis=-1)[:, 0]
    return new_top, total, target_logit + jnp.where(is_inside, picked_logits, 0), moment


def _shift_moment(moment, total, top, new_top):
    """Return the moment relative to another highest logit, from m = `top` to m' = `new_top`.

    sum of e' (l - m') = exp(m - m') (sum of e (l - m) + (m - m') sum of e), with e' = exp(l - m').
    """
    if moment is None:
        return None
    # Before the first word, `top` is -inf and `total` is 0. Their product would be NaN.
    shift = jnp.where(top > -jnp.inf, top - new_top, 0.0)
    return jnp.exp(shift) * (moment + shift * total)


def _choose_chunk_size(words: int, limit: int) -> int:
    """Return a chunk size of at most `limit` words, for the least number of chunks.

    It is a multiple of a tile's lanes, because XLA scatters the gradient of other chunks by an
    all-reduce of the whole chunk. Where that would pad by a tenth and more it is any size.
    """
    num_chunks = -(-words // limit)
    size = -(-words // num_chunks)
    aligned_limit = limit // TILE_LANES * TILE_LANES
    if aligned_limit:
        num_chunks = -(-words // aligned_limit)
        aligned = -(-words // (num_chunks * TILE_LANES)) * TILE_LANES
        if 10 * (aligned * num_chunks - words) < words:
            return aligned
    return size


def _replace_kernel(head: layers.Head, kernel: Float[Array, "D words"]) -> layers.Head:
    # Through the pytree, so that the parameter's metadata (logical axes) stays with it.
    return jax.tree.map(
        lambda param: param.replace(kernel),
        head,
        is_leaf=lambda node: isinstance(node, nnx.Param),
    )

"""Log-probabilities of given tokens without the logits of a whole sequence in memory."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import layers, sharding
from m1_jax import model as model_lib

MAX_LIVE_LOGITS = 2**27  # float32 logits alive at once on a device: 512 MiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """What was asked for of every token, [B, T] float32; None of what was not.

    logp: of the token. normalizer: the log of the softmax's sum. entropy: of the distribution the
    token is one of, -sum p log p, at least 0.
    """

    logp: Any
    log_normalizer: Any = None
    entropy: Any = None


def token_logprobs(
    model: model_lib.MiniMaxM1,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    vocab_chunk_size: int | None = None,
    with_log_normalizer: bool = False,
    with_entropy: bool = False,
    temperature: float = 1.0,
) -> Any:
    """Return log softmax(head(hidden) / temperature)[target] for every token: [B, T] float32.

    With `normalizers` or `entropy`, return `TokenLogprobs`. The entropy is exact, over all words,
    and has a gradient like the rest.

    Logits exist for `chunk_vocab` words at a time (None: as many as make `MAX_LIVE_LOGITS`), in the
    backward pass too, which computes them again. Chunks of words, not of tokens: so a device that
    holds a piece of the head gathers each part of it once. `hidden` is the output of the model's
    final norm.

    Raises:
      ValueError: a temperature that is not more than 0.
    """
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
        out = local(model.head, hidden, targets)
    else:
        sharding.check_batch_rows(layout, hidden.shape[0])
        more = -length % layout.axis_size("length")
        hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, more)))
        tokens = layout.activation_spec("batch", "length")
        program = sharding.run_sharded(
            layout,
            local,
            (
                sharding.param_specs(layout, model.head),
                layout.activation_spec("batch", "length", None),
                tokens,
            ),
            tokens,
        )
        out = jax.tree.map(lambda x: x[:, :length], program(model.head, hidden, targets))
    if not (with_log_normalizer or with_entropy):
        return out.logp
    return out if with_log_normalizer else dataclasses.replace(out, log_normalizer=None)


def _local_logprobs(
    head: layers.Head, hidden, targets, *, vocab_chunk_size, layout, with_entropy, temperature
):
    x, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    words = head.kernel.shape[-1]
    ids = ids - sharding.axis_index("vocab") * words
    vocab_chunk_size = min(
        vocab_chunk_size or _choose_chunk_size(words, max(MAX_LIVE_LOGITS // x.shape[0], 1)), words
    )
    # Float32, so that the gradients of all chunks add up in float32.
    x32 = x.astype(jnp.float32)

    @jax.checkpoint
    def chunk(carry, x32, kernel, start):
        part = sharding.gather_params(_replace_kernel(head, kernel), layout, x.dtype)
        logits = part(x32.astype(x.dtype))
        return _accumulate_logits(
            carry, logits if temperature == 1 else logits / temperature, ids - start
        )

    zeros = jnp.zeros(ids.shape, jnp.float32)
    moment = zeros if with_entropy else None
    carry = (jnp.full(ids.shape, -jnp.inf, jnp.float32), zeros, zeros, moment)
    kernel = head.kernel[...]
    full = words // vocab_chunk_size * vocab_chunk_size
    if full > vocab_chunk_size:
        parts = jnp.moveaxis(kernel[:, :full].reshape(kernel.shape[0], -1, vocab_chunk_size), 1, 0)
        starts = jnp.arange(parts.shape[0], dtype=jnp.int32) * vocab_chunk_size
        carry, _ = jax.lax.scan(
            lambda carry, xs: (chunk(carry, x32, *xs), None), carry, (parts, starts)
        )
        kernel = kernel[:, full:]
    else:
        full = 0
    if kernel.shape[1]:
        carry = chunk(carry, x32, kernel, full)
    top, total, chosen, moment = carry
    highest = sharding.pmax(jax.lax.stop_gradient(top), "vocab")
    moment = _shift_moment(moment, total, top, highest)
    total = sharding.psum(total * jnp.exp(top - highest), "vocab")
    out = TokenLogprobs(
        sharding.psum(chosen, "vocab") - highest - jnp.log(total),
        highest + jnp.log(total),
        None if moment is None else jnp.log(total) - sharding.psum(moment, "vocab") / total,
    )
    return jax.tree.map(lambda x: x.reshape(targets.shape), out)


def _accumulate_logits(carry, logits, target_index):
    """Take more words into (highest logit, sum of e = exp(logit - highest), chosen logit, moment).

    The moment is the sum of e * (logit - highest), or None.
    """
    top, total, chosen, moment = carry
    higher = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    moment = _shift_moment(moment, total, top, higher)
    lower = logits - higher[:, None]
    total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(lower), -1)
    if moment is not None:
        moment += jnp.sum(jnp.exp(lower) * lower, -1)
    here = (target_index >= 0) & (target_index < logits.shape[1])
    picked = jnp.take_along_axis(logits, jnp.where(here, target_index, 0)[:, None], axis=-1)[:, 0]
    return higher, total, chosen + jnp.where(here, picked, 0), moment


def _shift_moment(moment, total, top, higher):
    """Return the moment for another highest logit."""
    if moment is None:
        return None
    shift = jnp.where(top > -jnp.inf, top - higher, 0.0)  # no word yet: 0 * -inf would be NaN
    return jnp.exp(shift) * (moment + shift * total)


def _choose_chunk_size(words: int, limit: int) -> int:
    """Return the size of chunks up to a limit: equal ones where twice as many at most suffice."""
    least = -(-words // limit)
    return words // next((n for n in range(least, 2 * least) if words % n == 0), least)


def _replace_kernel(head: layers.Head, kernel) -> layers.Head:
    return jax.tree.map(
        lambda param: param.replace(kernel),
        head,
        is_leaf=lambda node: isinstance(node, nnx.Param),
    )

"""From logits to tokens: pure functions whose options are arrays, so that none recompiles.

For each row, in this order: repetition penalty, temperature, top_k, top_p, min_p, and the largest
of log p + Gumbel noise. Candidates are ordered by logit, equal logits by id: top_k keeps the first
k of that order, top_p its shortest prefix that holds at least the mass p of what top_k kept, min_p
what is at least min_p times as likely as the first.

No step sorts. Borders are found by bisection over the bits of the logits: exact, 32 sums over the
vocabulary at most (3 ms a row on one CPU core for 200,064 tokens, where a sort takes 43 ms), and
skipped at run time unless some row asks for them.

A row's noise depends on its own key alone, so neither the batch around it nor the order of
requests changes what it says.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of each row; make them with `options`.

    temperature: 0 takes the most likely token. top_p: 1 is off. top_k: 0 is off. min_p: 0 is off.
    repetition_penalty: 1 is off; as in transformers, over the prompt and the output.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]


# name: (the release's recommendation, check, what is wanted)
_FIELDS = {
    "temperature": (1.0, lambda x: x >= 0, "0 (greedy) or more"),
    "top_p": (0.95, lambda x: 0 < x <= 1, "more than 0, at most 1 (off)"),
    "top_k": (0, lambda x: 0 <= x < 2**31 and x == int(x), "a whole number, 0 (off) or more"),
    "min_p": (0.0, lambda x: 0 <= x <= 1, "0 (off) to 1"),
    "repetition_penalty": (1.0, lambda x: x > 0, "more than 0; 1 is off"),
}


def options(batch: int, **values: float | Sequence[float]) -> SamplingOptions:
    """Make options; arguments and errors as in `check`."""
    return SamplingOptions(**jax.tree.map(jnp.asarray, check(batch, **values)))


def check(batch: int, **values: float | Sequence[float]) -> dict[str, np.ndarray]:
    """Check options on the host, without touching a device; a single number is for all rows.

    Args:
      batch: number of rows.
      **values: fields of `SamplingOptions`; those left out have the release's recommendation,
        temperature 1.0, top_p 0.95 and no more.

    Returns:
      All fields, one value per row.

    Raises:
      ValueError: a value out of range, a number of values other than `batch`.
      TypeError: an unknown option.
    """
    unknown = values.keys() - _FIELDS.keys()
    if unknown:
        raise TypeError(f"got option {min(unknown)!r}; wanted one of {', '.join(_FIELDS)}")
    columns = {}
    for name, (default, valid, wanted) in _FIELDS.items():
        column = np.asarray(values.get(name, default))
        if column.ndim == 0:
            column = np.full(batch, column)
        if column.shape != (batch,):
            raise ValueError(f"{name}: got shape {column.shape}; wanted one number, or {batch}")
        for value in column.tolist():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and valid(value)):
                raise ValueError(f"{name}: got {value!r}; wanted {wanted}")
        columns[name] = column.astype(np.int32 if name == "top_k" else np.float32)
    return columns


def row_keys(seed: int | Int[Array, ""], rows: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return one key per row from the run's seed and the row's own number.

    Raises:
      ValueError: a seed that 32 bits do not hold, and that would silently become another one.
    """
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}; wanted 0 to {2**32 - 1}")
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows))


def step_keys(keys: Key[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return the keys for the tokens at these positions (counted from the prompt's start)."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def sample(
    logits: Float[Array, "B V"],
    options: SamplingOptions,
    keys: Key[Array, "B"],
    seen: Bool[Array, "B V"] | Int[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Choose one token per row.

    Args:
      logits: float32; -inf forbids a token.
      options: per row.
      keys: from `step_keys`, another one for every position.
      seen: which tokens (or how many of each) the row holds so far, prompt included; needed for
        the repetition penalty, None is nothing.

    Returns:
      tokens int32; their log-probability under the distribution that was sampled from (0 for
      greedy rows, which leave no choice); and their log-probability under the plain logits.
    """
    logits = logits.astype(jnp.float32)
    greedy = options.temperature < jnp.finfo(jnp.float32).tiny  # divisors that flush to 0
    x = logits if seen is None else _penalised(logits, seen != 0, options.repetition_penalty)

    def draw(x):
        # The largest is subtracted first: a small temperature then cannot overflow.
        hot = x - jnp.max(x, axis=-1, keepdims=True)
        hot = hot / jnp.where(greedy, 1.0, options.temperature)[:, None]
        narrowed = (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)
        hot = lax.cond(jnp.any(narrowed & ~greedy), _narrow, lambda x, _: x, hot, options)
        noise = jax.vmap(lambda key: gumbel(jax.random.bits(key, x.shape[1:], jnp.uint32)))(keys)
        tokens = _argmax(jnp.where(greedy[:, None], x, hot + noise))
        return tokens, jnp.where(greedy, 0.0, _logp(hot, tokens))

    def take_best(x):
        return _argmax(x), jnp.zeros(x.shape[:1], x.dtype)

    tokens, logp_sampled = lax.cond(jnp.all(greedy), take_best, draw, x)
    return tokens, logp_sampled, _logp(logits, tokens)


def gumbel(bits: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Turn uniform 32-bit integers into standard Gumbel noise, -log(-log(1 - u)).

    u near 0 makes the large values that decide a draw, and there float32 resolves all 32 bits;
    with u near 1 instead, one token in 2^23 would tie at the top.
    """
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def _argmax(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the first place of each row's largest; jnp.argmax takes 4 times as long on CPU."""
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    largest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x == largest, places, x.shape[1] - 1), axis=-1)


def _penalised(logits, seen, penalty):
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _logp(x: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    chosen = jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(x, axis=-1)


def _narrow(x: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Put -inf where top_k, top_p or min_p leave a token out. The largest x of a row is 0."""

    def top_k(x):
        on = (options.top_k > 0) & (options.top_k < x.shape[-1])
        # Whole numbers are exact in float32 up to 2^24, above any vocabulary.
        wanted = jnp.where(on, options.top_k, 0).astype(jnp.float32)
        return _keep_prefix(x, jnp.ones_like(x), wanted, on)

    def top_p(x):
        mass = jnp.exp(x)
        wanted = options.top_p * jnp.sum(mass, axis=-1)
        return _keep_prefix(x, mass, wanted, options.top_p < 1)

    x = lax.cond(jnp.any(options.top_k > 0), top_k, lambda x: x, x)
    x = lax.cond(jnp.any(options.top_p < 1), top_p, lambda x: x, x)
    return jnp.where(x >= jnp.log(options.min_p)[:, None], x, -jnp.inf)


def _keep_prefix(
    x: Float[Array, "B V"],
    weight: Float[Array, "B V"],
    wanted: Float[Array, "B"],
    on: Bool[Array, "B"],
) -> Float[Array, "B V"]:
    """Keep the shortest prefix, by x and then by id, whose weights sum to at least `wanted`.

    Weights are equal where x is. Rows that are not `on` stay as they are.
    """
    order = _ordered_bits(x)

    def weight_from(border):
        return jnp.sum(jnp.where(order >= border[:, None], weight, 0), axis=-1)

    def halve(bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        enough = weight_from(middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    # The border is the largest value with enough weight from it on; `low` always has enough.
    low, high = jnp.min(order, axis=-1), jnp.max(order, axis=-1)
    bounds = jnp.where(on, low, high), high
    border, _ = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, bounds)
    above = order > border[:, None]
    equal = order == border[:, None]
    missing = wanted - jnp.sum(jnp.where(above, weight, 0), axis=-1)
    each = jnp.max(jnp.where(equal, weight, 0), axis=-1)
    # Of tokens equal to the border take as many as are missing, lowest ids first, at least one.
    number = jnp.maximum(jnp.ceil(missing / jnp.maximum(each, jnp.finfo(x.dtype).tiny)), 1)
    keep = above | (equal & (jnp.cumsum(equal, axis=-1) <= number[:, None]))
    return jnp.where(keep | ~on[:, None], x, -jnp.inf)


def _ordered_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Map float32 to int32 such that a < b there exactly where a < b here; no NaN."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 equals 0.0
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

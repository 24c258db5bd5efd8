"""From logits to tokens: pure functions whose options are arrays, so that none recompiles.

Each row goes through these steps, in this order: penalties, logit bias, grammar mask, temperature,
top_k, top_p, min_p, and the largest of log p + Gumbel noise. Candidates are ordered by logit, and
equal logits by id. top_k keeps the first k of that order. top_p keeps the shortest prefix of it
that holds at least the mass p of what top_k kept. min_p keeps what is at least min_p times as
likely as the first.

No step sorts the vocabulary. Borders are found by bisection over the bits of the logits. That is
exact and takes 32 sums over the vocabulary at most (3 ms a row on one CPU core for 200,064 tokens,
where a sort takes 43 ms). What no row asks for is skipped at run time.

A row's results are bit-exact whatever the other rows are. Its noise depends on its own key alone.
Steps that only other rows ask for leave its values as they were (x / 1, x - 0, a border below
everything).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from infer import options as options_lib

TOP_LOGPROBS = options_lib.MAX_TOP_LOGPROBS
PROMPT_FLAG = 1 << 30  # added to a token's count: the token is in the prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of each row, as in `options.Options`. `make_options` makes and checks them.

    Attributes:
      temperature: 0 takes the most likely token.
      top_p: mass of the candidates that are kept, in (0, 1]. 1 is off.
      top_k: number of candidates that are kept. 0 is off.
      min_p: least likelihood relative to the likeliest token, 0 to 1. 0 is off.
      repetition_penalty: over prompt and output, as in transformers. 1 is off.
      presence_penalty: over the output alone. 0 is off.
      frequency_penalty: over the output alone, by count. 0 is off.
      top_logprobs: more than 0 asks for the most likely tokens.
    """

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    top_k: Int[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    top_logprobs: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenTokens:
    """One token per row, with log-probabilities.

    Attributes:
      token: the token chosen.
      logp: its log-probability under the distribution that was sampled from. 0 in greedy rows,
        which leave no choice. NaN where penalties and bias left no finite largest logit.
      logp_raw: its log-probability under the plain logits, temperature 1.
      top_ids: the most likely tokens of the plain logits, in descending order, and equal ones by
        id. -1 in rows that did not ask, and where the vocabulary is smaller than K.
      top_logp: the log-probabilities of `top_ids`. -inf where these are -1.
    """

    token: Int[Array, "B"]
    logp: Float[Array, "B"]
    logp_raw: Float[Array, "B"]
    top_ids: Int[Array, "B K"]
    top_logp: Float[Array, "B K"]


def make_options(batch: int, **values: float | Sequence[float]) -> SamplingOptions:
    """Return options on the device. Arguments and errors are those of `make_option_arrays`."""
    return SamplingOptions(**jax.tree.map(jnp.asarray, make_option_arrays(batch, **values)))


def make_option_arrays(batch: int, **values: float | Sequence[float]) -> dict[str, np.ndarray]:
    """Return checked options as host arrays, one value a row. A single number is for all rows.

    Args:
      batch: number of rows.
      **values: fields of `SamplingOptions`. Those left out have the release's recommendation,
        which is temperature 1.0, top_p 0.95 and no more.

    Returns:
      By name, all fields as NumPy arrays. No device is touched.

    Raises:
      ValueError: a value out of range, a number of values other than `batch`.
      TypeError: an unknown option.
    """
    unknown = values.keys() - options_lib.SAMPLING_FIELDS.keys()
    if unknown:
        names = ", ".join(options_lib.SAMPLING_FIELDS)
        raise TypeError(f"got option {min(unknown)!r}; wanted one of {names}")
    columns = {}
    for name, (default, is_valid, requirement) in options_lib.SAMPLING_FIELDS.items():
        column = np.asarray(values.get(name, default))
        if column.ndim == 0:
            column = np.full(batch, column)
        if column.shape != (batch,):
            raise ValueError(f"{name}: got shape {column.shape}; wanted one number, or {batch}")
        for value in column.tolist():
            # True is an int, too, and is no number here.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and is_valid(value)):
                raise ValueError(f"{name}: got {value!r}; wanted {requirement}")
        columns[name] = column.astype(np.int32 if isinstance(default, int) else np.float32)
    return columns


def sampling_keys(seeds: UInt[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return one key per row from its request's seed and the token's position in the sequence."""

    def make_key(seed, position):
        return jax.random.fold_in(jax.random.key(seed), position)

    return jax.vmap(make_key)(seeds, positions)


def sample_tokens(
    logits: Float[Array, "B V"],
    options: SamplingOptions,
    keys: Key[Array, "B"],
    counts: Int[Array, "B V"] | None = None,
    bias: Float[Array, "B V"] | None = None,
    mask: UInt[Array, "B W"] | None = None,
    banned: Int[Array, "B S"] | None = None,
    forced: Int[Array, "B"] | None = None,
) -> ChosenTokens:
    """Choose one token per row.

    Args:
      logits: -inf forbids a token.
      options: per row.
      keys: keys from `sampling_keys`, another one for every position.
      counts: how often each token occurs in the output, plus `PROMPT_FLAG` if it is in the
        prompt. The penalties need them.
      bias: added to the logits.
      mask: bit v % 32 of word v // 32 is set where a grammar allows token v.
      banned: ids that are not to be chosen (stop tokens before min_tokens). -1 is none.
        What mask and ban leave of a row must not be empty.
      forced: tokens that the host wants (the end of thinking) in place of what a row would
        choose. -1 is none. Their `logp` is -inf where the row would never choose them.
    """
    # In float32 from here on: the bisection reads its bits.
    logits = logits.astype(jnp.float32)
    x = _adjust_logits(logits, options, counts, bias, mask, banned)
    is_greedy = _is_greedy(options)

    def apply_forced(tokens):
        return tokens if forced is None else jnp.where(forced >= 0, forced, tokens)

    def draw_bits(key):
        return jax.random.bits(key, x.shape[1:], jnp.uint32)

    def draw(x):
        candidates = _sampling_logits(x, options)
        noise = jax.vmap(lambda key: gumbel_noise(draw_bits(key)))(keys)
        # Gumbel-max: the largest of log p + noise is a draw from p.
        drawn = _argmax_first(jnp.where(is_greedy[:, None], x, candidates + noise))
        tokens = apply_forced(drawn)
        logp = jnp.where(is_greedy, _greedy_logp(x, tokens, drawn), _token_logp(candidates, tokens))
        return tokens, logp

    def take_best(x):
        best = _argmax_first(x)
        tokens = apply_forced(best)
        return tokens, _greedy_logp(x, tokens, best)

    # A batch of greedy rows needs neither noise nor candidates.
    token, logp = lax.cond(jnp.all(is_greedy), take_best, draw, x)
    # Raw log-probabilities come from the logits as they were, before penalties and mask.
    return ChosenTokens(
        token, logp, _token_logp(logits, token), *_top_logprobs(logits, options.top_logprobs)
    )


def gumbel_noise(bits: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Turn uniform 32-bit integers into standard Gumbel noise, -log(-log(1 - u)).

    u near 0 makes the large values that decide a draw, and there float32 resolves all 32 bits. With
    u near 1 instead, one token in 2^23 would tie at the top.
    """
    # The half keeps u above 0, and the minimum below keeps it under 1: both logarithms are finite.
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def _argmax_first(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the first index of each row's largest value."""
    # Not jnp.argmax, which takes 4 times as long on CPU.
    indices = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    largest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x == largest, indices, x.shape[1] - 1), axis=-1)


def _greedy_logp(
    x: Float[Array, "B V"], tokens: Int[Array, "B"], best: Int[Array, "B"]
) -> Float[Array, "B"]:
    # All probability is on the best token. Among logits that overflowed, none is the best.
    has_best = jnp.isfinite(jnp.max(x, axis=-1))
    return jnp.where(has_best, jnp.where(tokens == best, 0.0, -jnp.inf), jnp.nan)


def _is_greedy(options: SamplingOptions) -> Bool[Array, "B"]:
    # Smaller divisors than this flush to 0.
    return options.temperature < jnp.finfo(jnp.float32).tiny


def _sampling_logits(x: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Return what is sampled from, as logits whose largest is 0. Greedy rows have a stand-in."""
    is_greedy = _is_greedy(options)
    # The largest is subtracted first: a small temperature then cannot overflow.
    scaled = x - jnp.max(x, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(is_greedy, 1.0, options.temperature)[:, None]
    is_narrowed = (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)
    return lax.cond(
        jnp.any(is_narrowed & ~is_greedy), _narrow_candidates, lambda x, _: x, scaled, options
    )


def _adjust_logits(
    x: Float[Array, "B V"],
    options: SamplingOptions,
    counts: Int[Array, "B V"] | None,
    bias: Float[Array, "B V"] | None,
    mask: UInt[Array, "B W"] | None,
    banned: Int[Array, "B S"] | None,
) -> Float[Array, "B V"]:
    """Apply penalties, bias, grammar mask and ban, each one if any row asks for it."""
    # Each step also passes over the rows that do not ask: their values come out as they were.
    if counts is not None:
        is_penalised = (options.repetition_penalty != 1) | (options.presence_penalty != 0)
        is_penalised |= options.frequency_penalty != 0
        x = lax.cond(
            jnp.any(is_penalised), lambda x: _apply_penalties(x, options, counts), lambda x: x, x
        )
    if bias is not None:
        # Not x + 0, which would turn -0.0 into 0.0.
        x = lax.cond(
            jnp.any(bias != 0), lambda x: jnp.where(bias != 0, x + bias, x), lambda x: x, x
        )
    if mask is not None:
        is_masked = jnp.any(mask != jnp.uint32(0xFFFFFFFF))
        x = lax.cond(is_masked, lambda x: _apply_mask(x, mask), lambda x: x, x)
    if banned is not None:
        x = lax.cond(jnp.any(banned >= 0), lambda x: _ban_tokens(x, banned), lambda x: x, x)
    return x


def _apply_penalties(
    x: Float[Array, "B V"], options: SamplingOptions, counts: Int[Array, "B V"]
) -> Float[Array, "B V"]:
    """Repetition over prompt and output, frequency and presence over the output."""
    repetition = options.repetition_penalty[:, None]
    frequency = options.frequency_penalty[:, None]
    presence = options.presence_penalty[:, None]
    output_counts = counts & (PROMPT_FLAG - 1)
    # As in transformers: towards less likely on both sides of 0.
    penalised = jnp.where(x > 0, x / repetition, x * repetition)
    # Any flag or count: the token is in the prompt or in the output.
    x = jnp.where((counts != 0) & (repetition != 1), penalised, x)
    x = jnp.where(frequency != 0, x - frequency * output_counts.astype(x.dtype), x)
    return jnp.where((presence != 0) & (output_counts > 0), x - presence, x)


def _apply_mask(x: Float[Array, "B V"], mask: UInt[Array, "B W"]) -> Float[Array, "B V"]:
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits = (mask[:, :, None] >> shifts) & 1
    # The last word may have bits past the vocabulary.
    return jnp.where(bits.reshape(x.shape[0], -1)[:, : x.shape[1]] != 0, x, -jnp.inf)


def _ban_tokens(x: Float[Array, "B V"], banned: Int[Array, "B S"]) -> Float[Array, "B V"]:
    rows = jnp.arange(x.shape[0])[:, None]
    # Negative indices would count from the end. Those past the end are dropped.
    return x.at[rows, jnp.where(banned < 0, x.shape[1], banned)].set(-jnp.inf, mode="drop")


def _top_logprobs(
    logits: Float[Array, "B V"], num_top: Int[Array, "B"]
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """Return ids and log-probabilities of the most likely tokens, if any row asks for them."""
    shape = (logits.shape[0], TOP_LOGPROBS)
    no_ids, no_logp = jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, logits.dtype)

    def find_top(logits):
        top, ids = lax.top_k(logits, min(TOP_LOGPROBS, logits.shape[1]))
        # A small vocabulary has fewer tokens than columns.
        padding = ((0, 0), (0, TOP_LOGPROBS - top.shape[1]))
        logp = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        ids = jnp.pad(ids, padding, constant_values=-1)
        logp = jnp.pad(logp, padding, constant_values=-jnp.inf)
        is_wanted = (num_top > 0)[:, None]
        return jnp.where(is_wanted, ids, no_ids), jnp.where(is_wanted, logp, no_logp)

    return lax.cond(jnp.any(num_top > 0), find_top, lambda _: (no_ids, no_logp), logits)


def _token_logp(x: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    chosen = jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(x, axis=-1)


def _narrow_candidates(x: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Put -inf where top_k, top_p or min_p leave a token out. The largest x of a row is 0."""

    # Both keep a prefix whose weights reach a sum: ones reach k, and probabilities reach p.
    def keep_top_k(x):
        is_on = (options.top_k > 0) & (options.top_k < x.shape[-1])
        # Whole numbers are exact in float32 up to 2^24, above any vocabulary.
        min_sum = jnp.where(is_on, options.top_k, 0).astype(jnp.float32)
        return _keep_prefix_mass(x, jnp.ones_like(x), min_sum, is_on)

    def keep_top_p(x):
        # Not normalised: the sum is compared with p times the sum of all that top_k kept.
        mass = jnp.exp(x)
        min_sum = options.top_p * jnp.sum(mass, axis=-1)
        return _keep_prefix_mass(x, mass, min_sum, options.top_p < 1)

    x = lax.cond(jnp.any(options.top_k > 0), keep_top_k, lambda x: x, x)
    x = lax.cond(jnp.any(options.top_p < 1), keep_top_p, lambda x: x, x)
    # The likeliest token has x = 0, so x is the log of a token's likelihood relative to it.
    return jnp.where(x >= jnp.log(options.min_p)[:, None], x, -jnp.inf)


def _keep_prefix_mass(
    x: Float[Array, "B V"],
    weight: Float[Array, "B V"],
    min_sum: Float[Array, "B"],
    is_on: Bool[Array, "B"],
) -> Float[Array, "B V"]:
    """Keep the shortest prefix, by x and then by id, whose weights sum to at least `min_sum`.

    Weights are equal where x is. Rows where `is_on` is False stay as they are.
    """
    order = _ordered_bits(x)

    def weight_from(border):
        return jnp.sum(jnp.where(order >= border[:, None], weight, 0), axis=-1)

    def halve(bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        is_enough = weight_from(middle) >= min_sum
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle - 1)

    # The border is the largest value with enough weight from it on. `low` always has enough.
    low, high = jnp.min(order, axis=-1), jnp.max(order, axis=-1)
    # A row that is not on has nothing to search: its bounds meet at once.
    bounds = jnp.where(is_on, low, high), high
    border, _ = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, bounds)
    is_above = order > border[:, None]
    is_equal = order == border[:, None]
    missing_sum = min_sum - jnp.sum(jnp.where(is_above, weight, 0), axis=-1)
    border_weight = jnp.max(jnp.where(is_equal, weight, 0), axis=-1)
    # Among tokens equal to the border, as many as are missing are kept, lowest ids first, and at
    # least one. `tiny` avoids 0 / 0 where the weight underflowed.
    tiny = jnp.finfo(x.dtype).tiny
    num_equal = jnp.maximum(jnp.ceil(missing_sum / jnp.maximum(border_weight, tiny)), 1)
    keep = is_above | (is_equal & (jnp.cumsum(is_equal, axis=-1) <= num_equal[:, None]))
    return jnp.where(keep | ~is_on[:, None], x, -jnp.inf)


def _ordered_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Map float32 to int32 such that a < b there exactly where a < b here, for x without NaN."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 equals 0.0
    # Bits of negative floats rise with their magnitude, so all but the sign are flipped.
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

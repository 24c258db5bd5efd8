"""From logits to tokens: pure functions whose options are arrays, so that none recompiles.

For each row, in this order: penalties, logit bias, grammar mask, temperature, top_k, top_p, min_p,
and the largest of log p + Gumbel noise. Candidates are ordered by logit, equal logits by id: top_k
keeps the first k of that order, top_p its shortest prefix that holds at least the mass p of what
top_k kept, min_p what is at least min_p times as likely as the first.

No step sorts the vocabulary. Borders are found by bisection over the bits of the logits: exact, 32
sums over the vocabulary at most (3 ms a row on one CPU core for 200,064 tokens, where a sort takes
43 ms). What no row asks for is skipped at run time.

A row's results depend on nothing but the row, to the bit: its noise on its own key alone, and
whatever other rows ask for leaves it exactly as it was (x / 1, x - 0, a border below everything).
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
PROMPT_FLAG = 1 << 30  # in `counts`: the token is in the prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of each row, as in `options.Options`; make them with `make_options`.

    temperature: 0 takes the most likely token. top_p: 1 is off. top_k: 0 is off. min_p: 0 is off.
    repetition_penalty: 1 is off; as in transformers, over the prompt and the output.
    presence_penalty, frequency_penalty: 0 is off; over the output alone.
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
class TokenChoices:
    """One token per row, with log-probabilities.

    logp: under the distribution that was sampled from; 0 in greedy rows, which leave no choice.
    logp_raw: under the plain logits, temperature 1.
    top_ids, top_logp: the most likely tokens of the plain logits and theirs, in descending order,
      equal ones by id; -1 and -inf in rows that did not ask, and beyond a small vocabulary.
    """

    token: Int[Array, "B"]
    logp: Float[Array, "B"]
    logp_raw: Float[Array, "B"]
    top_ids: Int[Array, "B K"]
    top_logp: Float[Array, "B K"]


def make_options(batch: int, **values: float | Sequence[float]) -> SamplingOptions:
    """Make options; arguments and errors as in `check_sampling_options`."""
    return SamplingOptions(**jax.tree.map(jnp.asarray, check_sampling_options(batch, **values)))


def check_sampling_options(batch: int, **values: float | Sequence[float]) -> dict[str, np.ndarray]:
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
    unknown = values.keys() - options_lib.SAMPLING_FIELDS.keys()
    if unknown:
        wanted = ", ".join(options_lib.SAMPLING_FIELDS)
        raise TypeError(f"got option {min(unknown)!r}; wanted one of {wanted}")
    columns = {}
    for name, (default, valid, wanted) in options_lib.SAMPLING_FIELDS.items():
        column = np.asarray(values.get(name, default))
        if column.ndim == 0:
            column = np.full(batch, column)
        if column.shape != (batch,):
            raise ValueError(f"{name}: got shape {column.shape}; wanted one number, or {batch}")
        for value in column.tolist():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and valid(value)):
                raise ValueError(f"{name}: got {value!r}; wanted {wanted}")
        columns[name] = column.astype(np.int32 if isinstance(default, int) else np.float32)
    return columns


def sampling_keys(seeds: UInt[Array, "B"], positions: Int[Array, "B"]) -> Key[Array, "B"]:
    """Return one key per row from its request's seed and the token's place in the sequence."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds, positions)


def sample_tokens(
    logits: Float[Array, "B V"],
    options: SamplingOptions,
    keys: Key[Array, "B"],
    counts: Int[Array, "B V"] | None = None,
    bias: Float[Array, "B V"] | None = None,
    mask: UInt[Array, "B W"] | None = None,
    banned: Int[Array, "B S"] | None = None,
    forced: Int[Array, "B"] | None = None,
) -> TokenChoices:
    """Choose one token per row.

    Args:
      logits: -inf forbids a token.
      options: per row.
      keys: from `sampling_keys`, another one for every position.
      counts: how often each token occurs in the output, plus `PROMPT_FLAG` if it is in the
        prompt; needed for the penalties.
      bias: added to the logits.
      mask: bit v % 32 of word v // 32 is set where a grammar allows token v.
      banned: ids that are not to be chosen (stop tokens before min_tokens); -1 is none.
        What mask and ban leave of a row must not be empty.
      forced: tokens that the host wants (the end of thinking) in place of what a row would
        choose, with their log-probabilities: `logp` is -inf where it would never choose them;
        -1 is none.
    """
    logits = logits.astype(jnp.float32)
    x = _adjust_logits(logits, options, counts, bias, mask, banned)
    greedy = _is_greedy(options)

    def replaced(tokens):
        return tokens if forced is None else jnp.where(forced >= 0, forced, tokens)

    def greedy_logp(tokens, best):
        return jnp.where(tokens == best, 0.0, -jnp.inf)

    def draw(x):
        hot = _sampling_logits(x, options)
        noise = jax.vmap(lambda key: gumbel_noise(jax.random.bits(key, x.shape[1:], jnp.uint32)))(
            keys
        )
        drawn = _argmax_first(jnp.where(greedy[:, None], x, hot + noise))
        tokens = replaced(drawn)
        return tokens, jnp.where(greedy, greedy_logp(tokens, drawn), _token_logp(hot, tokens))

    def take_best(x):
        best = _argmax_first(x)
        tokens = replaced(best)
        return tokens, greedy_logp(tokens, best)

    token, logp = lax.cond(jnp.all(greedy), take_best, draw, x)
    return TokenChoices(
        token, logp, _token_logp(logits, token), *_top_logprobs(logits, options.top_logprobs)
    )


def gumbel_noise(bits: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Turn uniform 32-bit integers into standard Gumbel noise, -log(-log(1 - u)).

    u near 0 makes the large values that decide a draw, and there float32 resolves all 32 bits;
    with u near 1 instead, one token in 2^23 would tie at the top.
    """
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def _argmax_first(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the first place of each row's largest; jnp.argmax takes 4 times as long on CPU."""
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    largest = jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x == largest, places, x.shape[1] - 1), axis=-1)


def _is_greedy(options: SamplingOptions) -> Bool[Array, "B"]:
    return options.temperature < jnp.finfo(jnp.float32).tiny  # divisors that flush to 0


def _sampling_logits(x: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Return what is sampled from, as logits whose largest is 0; greedy rows have a stand-in."""
    greedy = _is_greedy(options)
    # The largest is subtracted first: a small temperature then cannot overflow.
    hot = x - jnp.max(x, axis=-1, keepdims=True)
    hot = hot / jnp.where(greedy, 1.0, options.temperature)[:, None]
    narrowed = (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)
    return lax.cond(jnp.any(narrowed & ~greedy), _narrow_candidates, lambda x, _: x, hot, options)


def _adjust_logits(
    x: Float[Array, "B V"],
    options: SamplingOptions,
    counts: Int[Array, "B V"] | None,
    bias: Float[Array, "B V"] | None,
    mask: UInt[Array, "B W"] | None,
    banned: Int[Array, "B S"] | None,
) -> Float[Array, "B V"]:
    """Apply penalties, bias, grammar mask and ban, each one if any row asks for it."""
    if counts is not None:
        penalty = (options.repetition_penalty != 1) | (options.presence_penalty != 0)
        wanted = jnp.any(penalty | (options.frequency_penalty != 0))
        x = lax.cond(wanted, lambda x: _apply_penalties(x, options, counts), lambda x: x, x)
    if bias is not None:
        wanted = jnp.any(bias != 0)
        x = lax.cond(wanted, lambda x: jnp.where(bias != 0, x + bias, x), lambda x: x, x)
    if mask is not None:
        wanted = jnp.any(mask != jnp.uint32(0xFFFFFFFF))
        x = lax.cond(wanted, lambda x: _apply_mask(x, mask), lambda x: x, x)
    if banned is not None:
        x = lax.cond(jnp.any(banned >= 0), lambda x: _ban_tokens(x, banned), lambda x: x, x)
    return x


def _apply_penalties(x, options: SamplingOptions, counts: Int[Array, "B V"]):
    """Repetition over prompt and output, frequency and presence over the output."""
    repetition = options.repetition_penalty[:, None]
    frequency = options.frequency_penalty[:, None]
    presence = options.presence_penalty[:, None]
    output = counts & (PROMPT_FLAG - 1)
    smaller = jnp.where(x > 0, x / repetition, x * repetition)
    x = jnp.where((counts != 0) & (repetition != 1), smaller, x)
    x = jnp.where(frequency != 0, x - frequency * output.astype(x.dtype), x)
    return jnp.where((presence != 0) & (output > 0), x - presence, x)


def _apply_mask(x, mask: UInt[Array, "B W"]):
    places = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits = (mask[:, :, None] >> places) & 1
    return jnp.where(bits.reshape(x.shape[0], -1)[:, : x.shape[1]] != 0, x, -jnp.inf)


def _ban_tokens(x, banned: Int[Array, "B S"]):
    rows = jnp.arange(x.shape[0])[:, None]
    # Negative places would count from the end; those past it are dropped.
    return x.at[rows, jnp.where(banned < 0, x.shape[1], banned)].set(-jnp.inf, mode="drop")


def _top_logprobs(
    logits: Float[Array, "B V"], wanted: Int[Array, "B"]
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """Return ids and log-probabilities of the most likely tokens, if any row asks for them."""
    shape = (logits.shape[0], TOP_LOGPROBS)
    none = jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, logits.dtype)

    def find(logits):
        found, ids = lax.top_k(logits, min(TOP_LOGPROBS, logits.shape[1]))
        rest = ((0, 0), (0, TOP_LOGPROBS - found.shape[1]))
        logp = found - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        ids = jnp.pad(ids, rest, constant_values=-1)
        logp = jnp.pad(logp, rest, constant_values=-jnp.inf)
        asked = (wanted > 0)[:, None]
        return jnp.where(asked, ids, none[0]), jnp.where(asked, logp, none[1])

    return lax.cond(jnp.any(wanted > 0), find, lambda _: none, logits)


def _token_logp(x: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    chosen = jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(x, axis=-1)


def _narrow_candidates(x: Float[Array, "B V"], options: SamplingOptions) -> Float[Array, "B V"]:
    """Put -inf where top_k, top_p or min_p leave a token out. The largest x of a row is 0."""

    def top_k(x):
        on = (options.top_k > 0) & (options.top_k < x.shape[-1])
        # Whole numbers are exact in float32 up to 2^24, above any vocabulary.
        wanted = jnp.where(on, options.top_k, 0).astype(jnp.float32)
        return _keep_prefix_mass(x, jnp.ones_like(x), wanted, on)

    def top_p(x):
        mass = jnp.exp(x)
        wanted = options.top_p * jnp.sum(mass, axis=-1)
        return _keep_prefix_mass(x, mass, wanted, options.top_p < 1)

    x = lax.cond(jnp.any(options.top_k > 0), top_k, lambda x: x, x)
    x = lax.cond(jnp.any(options.top_p < 1), top_p, lambda x: x, x)
    return jnp.where(x >= jnp.log(options.min_p)[:, None], x, -jnp.inf)


def _keep_prefix_mass(
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

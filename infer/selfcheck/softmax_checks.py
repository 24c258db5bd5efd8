"""Softmax attention against the oracle: whole rows (splash attention, XLA) and serving's pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from infer.selfcheck import check, oracles
from m1_jax import attention, splash_attention
from m1_jax.serving import ragged_batch, softmax
from m1_jax.serving import state as state_lib

# Relative L2 of (o, gradients). float32: sums of another order, as in the tests of each form, with
# ten times as many keys on a device. bfloat16: o and gradients are rounded (1.7e-3 each), and so is
# the scale that splash attention rounds into q. Gradients go through o, too.
ROW_TOLERANCES = {"float32": (2e-6, 2e-6), "bfloat16": (5e-3, 1e-2)}
# Absolute, as in the tests of serving's softmax attention: float32 sums. In bfloat16 outputs of up
# to 4 are rounded by up to 2^-7, and probabilities add as much again.
PAGE_TOLERANCES = {"float32": 2e-6, "bfloat16": 2**-6}
HEAD_DIM = 128
# (tokens, query heads, kv heads). In small, with a length that is no multiple of a block.
DEVICE_SIZES, SMALL_SIZES = (1300, 8, 2), (300, 2, 1)
TILE, NUM_PAGES = 8, 40
# (tokens of the long and of the short sequence, tokens of a page).
DEVICE_PAGE_SIZES, SMALL_PAGE_SIZES = (1100, 300, 64), (90, 45, 16)
STACK_INDEX = (1, 0)  # of two layers


def check_rows(form: str, dtype: str, setting: check.DeviceSetting) -> check.CheckFindings:
    """Compare attention over whole rows, plain and packed, with its gradients."""
    interpret = setting.interpret_kernel("tpu") if form == "splash" else False
    errors = []
    for label in ("plain", "packed"):
        errors += _compare_rows(form, dtype, setting.is_small, interpret, label)
    return check.CheckFindings(errors)


def _compare_rows(
    form: str, dtype: str, is_small: bool, interpret: bool, label: str
) -> list[check.MeasuredError]:
    length, num_heads, num_kv = SMALL_SIZES if is_small else DEVICE_SIZES
    rng = np.random.default_rng(0)
    heads = (num_heads, num_kv, num_kv, num_heads)
    q, k, v, d_o = (_draw(rng, (1, length, n, HEAD_DIM), dtype) for n in heads)
    segment_ids = None
    if label == "packed":
        # Documents that begin inside of blocks, padding between them and at the end.
        lengths = np.asarray([30, 4, length // 2, 11])
        counts = [*lengths, length - lengths.sum()]
        segment_ids = jnp.asarray(np.repeat([[1, 0, 2, 3, 0]], counts, axis=1), jnp.int32)

    @jax.jit
    def run(q, k, v, d_o):
        def attend(q, k, v):
            if form == "splash":
                return splash_attention.attend_rows(q, k, v, segment_ids, interpret=interpret)
            return attention.attend_whole_rows(q, k, v, segment_ids, "xla")

        o, pull_back = jax.vjp(attend, q, k, v)
        return o, *pull_back(d_o)

    with check.compute_in_float32(dtype):
        outputs = run(q, k, v, d_o)
    ids = None if segment_ids is None else np.asarray(segment_ids[0])
    wanted = oracles.attend_softmax(q[0], k[0], v[0], ids, d_o[0])
    of_o, of_gradients = ROW_TOLERANCES[dtype]
    names = ("o", "d_q", "d_k", "d_v")
    return [
        check.MeasuredError(
            f"{name}, {label}",
            oracles.relative_error(got[0], expected),
            of_o if name == "o" else of_gradients,
        )
        for name, got, expected in zip(names, outputs, wanted, strict=True)
    ]


def _draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), dtype))


# ---- serving: keys and values in pages


class PageServer:
    """Pages of one layer in a stack, and the program that appends rows to them."""

    def __init__(self, implementation: str, dtype: str, chunk: int, num_heads: int, num_kv: int):
        self.chunk = chunk
        shape = (2, 1, NUM_PAGES, num_kv, chunk, HEAD_DIM)
        # Pages that nobody wrote hold NaN, and it must reach nobody.
        self.cache = state_lib.PagedKVCache(*(jnp.full(shape, jnp.nan, dtype) for _ in range(2)))
        self._heads, self._dtype = (num_heads, num_kv, num_kv), dtype
        self._attend = jax.jit(
            lambda q, k, v, batch, cache: softmax.attend_pages(
                q, k, v, batch, cache, STACK_INDEX, implementation
            ),
            donate_argnums=4,
        )

    def append(self, parts, rows_per_tile: int, num_tiles: int) -> list[np.ndarray]:
        """Append rows, and return the output of each part.

        Args:
          parts: (q k v of a sequence, first row, end row, its pages).
          rows_per_tile: `TILE` in prefill, 1 in decoding.
        """
        num_rows = num_tiles * rows_per_tile
        positions = np.full(num_rows, -1, np.int32)
        pages = np.zeros((num_tiles, NUM_PAGES), np.int32)
        arrays = [np.full((num_rows, n, HEAD_DIM), np.nan, np.float32) for n in self._heads]
        next_tile, row_ids = 0, []
        for qkv, first, end, own_pages in parts:
            # A row has the same place in its tile always. In decoding each tile holds one row.
            offset = first % TILE if rows_per_tile > 1 else 0
            rows = np.arange(end - first) + next_tile * rows_per_tile + offset
            positions[rows] = np.arange(first, end)
            for array, values in zip(arrays, qkv, strict=True):
                array[rows] = values[first:end].astype(np.float32)
            end_tile = rows[-1] // rows_per_tile + 1
            pages[next_tile:end_tile, : len(own_pages)] = own_pages
            next_tile = end_tile
            row_ids.append(rows)
        slots = np.zeros(num_tiles, np.int32)
        batch = ragged_batch.RaggedBatch(
            jnp.asarray(positions), jnp.asarray(slots), jnp.asarray(pages), TILE, 8
        )
        o, self.cache = self._attend(
            *(jnp.asarray(array, self._dtype) for array in arrays), batch, self.cache
        )
        o = oracles.to_float64(o)
        return [o[rows] for rows in row_ids]


def check_pages(
    implementation: str, dtype: str, setting: check.DeviceSetting
) -> check.CheckFindings:
    """Compare serving's softmax attention: two sequences, read together and then decoded."""
    if implementation == "tpu" and setting.interpret_kernel("tpu"):
        implementation = "tpu_interpret"
    long_length, short_length, chunk = SMALL_PAGE_SIZES if setting.is_small else DEVICE_PAGE_SIZES
    _, num_heads, num_kv = SMALL_SIZES if setting.is_small else DEVICE_SIZES
    rng = np.random.default_rng(0)
    # Pages of one sequence lie anywhere, in any order.
    order = rng.permutation(np.arange(1, NUM_PAGES))
    num_long = -(-long_length // chunk)
    sequences = [
        (_draw_qkv(rng, long_length, num_heads, num_kv, dtype), order[:num_long]),
        (_draw_qkv(rng, short_length, num_heads, num_kv, dtype), order[num_long : num_long + 10]),
    ]
    server = PageServer(implementation, dtype, chunk, num_heads, num_kv)
    lengths, decoded = (long_length, short_length), 6
    outputs: list[list[np.ndarray]] = [[], []]
    with check.compute_in_float32(dtype):
        num_tiles = sum(-(-length // TILE) for length in lengths) + 2
        starts = [
            (qkv, 0, length - decoded, pages)
            for (qkv, pages), length in zip(sequences, lengths, strict=True)
        ]
        for rows, part in zip(outputs, server.append(starts, TILE, num_tiles), strict=True):
            rows.append(part)
        for step in range(decoded):
            parts = [
                (qkv, length - decoded + step, length - decoded + step + 1, pages)
                for (qkv, pages), length in zip(sequences, lengths, strict=True)
            ]
            for rows, part in zip(outputs, server.append(parts, 1, 8), strict=True):
                rows.append(part)
    errors = []
    for label, (qkv, _), rows in zip(("long", "short"), sequences, outputs, strict=True):
        got, q = np.concatenate(rows), oracles.to_float64(qkv[0])
        wanted = oracles.attend_softmax(*qkv, segment_ids=None, d_o=np.zeros_like(q))[0]
        error = float(np.max(np.abs(got - wanted)))
        errors.append(check.MeasuredError(f"o, {label} sequence", error, PAGE_TOLERANCES[dtype]))
    return check.CheckFindings(errors, _find_foreign_pages(server, sequences))


def _draw_qkv(rng, length: int, num_heads: int, num_kv: int, dtype: str) -> list[np.ndarray]:
    return [_draw(rng, (length, n, HEAD_DIM), dtype) for n in (num_heads, num_kv, num_kv)]


def _find_foreign_pages(server: PageServer, sequences) -> list[str]:
    """Return a line for each array that was written outside of the sequences' pages."""
    own = sorted({0, *(int(page) for _, pages in sequences for page in pages)})
    problems = []
    for name in ("keys", "values"):
        array = np.array(oracles.to_float64(getattr(server.cache, name)))
        array[STACK_INDEX][own] = np.nan
        if not np.isnan(array).all():
            problems.append(f"{name}: pages of others or another layer were written")
    return problems


def list_checks() -> list[check.DeviceCheck]:
    """Return the checks of all forms."""
    rows = {"splash": "splash attention", "xla": "softmax attention (XLA)"}
    pages = {
        "tpu": "serving softmax attention (TPU kernel)",
        "xla": "serving softmax attention (XLA)",
    }
    return [
        check.DeviceCheck(f"{title}, {dtype}", "kernels", functools.partial(run, name, dtype))
        for run, titles in ((check_rows, rows), (check_pages, pages))
        for name, title in titles.items()
        for dtype in ROW_TOLERANCES
    ]

"""What kernels are compared with: their definitions, in float64 on the host.

The device's own arithmetic plays no part. On a TPU float32 products are bfloat16 by default, and a
float32 recurrence is off by the rounding of exp(-s), times the number of tokens.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class LightningResult(NamedTuple):
    """Outputs of lightning attention, and gradients for cotangents of o and of the state."""

    o: Float[np.ndarray, "B T NH"]
    state: Float[np.ndarray, "B N H H"]
    d_qkv: Float[np.ndarray, "B T N3H"]
    d_state: Float[np.ndarray, "B N H H"]


def attend_lightning(
    qkv: Float[np.ndarray, "B T N3H"],
    slopes: Float[np.ndarray, "N"],
    segment_ids: Int[np.ndarray, "B T"] | None,
    state: Float[np.ndarray, "B N H H"],
    d_o: Float[np.ndarray, "B T NH"],
    d_final: Float[np.ndarray, "B N H H"],
) -> LightningResult:
    """Run S_t = exp(-s) S_(t-1) + k_t^T v_t, o_t = q_t S_t, and its adjoint, token by token.

    Padding (id 0) reads nothing and leaves the state alone. A change between two other ids starts
    from an empty state.

        d_q_t = S_t do_t         G_t = q_t^T do_t + exp(-s) G_(t+1)
        d_k_t = G_t v_t          d_v_t = k_t G_t
    """
    batch, length, _ = qkv.shape
    heads = len(slopes)
    ids = np.ones((batch, length), np.int32) if segment_ids is None else segment_ids
    is_real, is_start = ids > 0, _mark_starts(ids)
    x = np.where(is_real[:, :, None], qkv, 0).astype(np.float64)
    x = x.reshape(batch, length, heads, 3, -1)
    q, k, v = x[:, :, :, 0], x[:, :, :, 1], x[:, :, :, 2]
    d_out = np.where(is_real[:, :, None], d_o, 0).astype(np.float64).reshape(q.shape)
    decay = np.exp(-slopes.astype(np.float64))[None, :, None, None]
    o, d_x, now = np.zeros(q.shape), np.zeros(x.shape), state.astype(np.float64)
    for t in range(length):
        # What the step before left, or nothing where a document starts.
        carried = np.where(is_start[:, t, None, None, None], 0, decay * now)
        now = np.where(
            is_real[:, t, None, None, None],
            carried + k[:, t, :, :, None] * v[:, t, :, None, :],
            now,
        )
        mask = is_real[:, t, None, None]
        o[:, t] = np.where(mask, (q[:, t, :, None, :] @ now)[:, :, 0], 0)
        d_x[:, t, :, 0] = np.where(mask, (now @ d_out[:, t, :, :, None])[..., 0], 0)
    gradient = d_final.astype(np.float64)
    for t in reversed(range(length)):
        mask = is_real[:, t, None, None]
        # q and do are 0 in padding.
        gradient = gradient + q[:, t, :, :, None] * d_out[:, t, :, None, :]
        d_x[:, t, :, 1] = np.where(mask, (gradient @ v[:, t, :, :, None])[..., 0], 0)
        d_x[:, t, :, 2] = np.where(mask, (k[:, t, :, None, :] @ gradient)[:, :, 0], 0)
        before = np.where(is_start[:, t, None, None, None], 0, decay * gradient)
        gradient = np.where(is_real[:, t, None, None, None], before, gradient)
    return LightningResult(
        o.reshape(batch, length, -1), now, d_x.reshape(batch, length, -1), gradient
    )


def _mark_starts(ids: Int[np.ndarray, "B T"]) -> np.ndarray:
    """Mark the first token of each document but the row's first, which continues the state."""
    starts = np.zeros(ids.shape, bool)
    for row, row_starts in zip(ids, starts, strict=True):
        document = 0
        for t, number in enumerate(row):
            row_starts[t] = number > 0 and document not in (0, number)
            document = number or document
    return starts


def attend_softmax(
    q: Float[np.ndarray, "T N H"],
    k: Float[np.ndarray, "T K H"],
    v: Float[np.ndarray, "T K H"],
    segment_ids: Int[np.ndarray, "T"] | None,
    d_o: Float[np.ndarray, "T N H"],
) -> tuple[np.ndarray, ...]:
    """Return o, d_q, d_k and d_v of causal attention within documents, for one row."""
    length, num_heads, size = q.shape
    group = num_heads // k.shape[1]
    q, d_o = (x.astype(np.float64).swapaxes(0, 1) for x in (q, d_o))
    k, v = (np.repeat(x.astype(np.float64).swapaxes(0, 1), group, axis=0) for x in (k, v))
    mask = np.tril(np.ones((length, length), bool))
    if segment_ids is not None:
        mask &= segment_ids[:, None] == segment_ids[None]
    scores = np.where(mask, q @ k.swapaxes(1, 2) / math.sqrt(size), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = weights @ v
    d_scores = weights * (d_o @ v.swapaxes(1, 2) - np.sum(d_o * o, -1, keepdims=True))
    d_scores /= math.sqrt(size)
    # A kv head has the gradients of all query heads that read it.
    d_k, d_v = (
        x.reshape(-1, group, length, size).sum(1)
        for x in (d_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ d_o)
    )
    return tuple(x.swapaxes(0, 1) for x in (o, d_scores @ k, d_k, d_v))


class ExpertsResult(NamedTuple):
    """Outputs of grouped experts, and gradients of all float inputs for a cotangent of y."""

    y: Float[np.ndarray, "M D"]
    d_rows: Float[np.ndarray, "M D"]
    d_gate: Float[np.ndarray, "E D F"]
    d_up: Float[np.ndarray, "E D F"]
    d_down: Float[np.ndarray, "E F D"]
    d_weights: Float[np.ndarray, "M"]


def run_experts(
    rows: Float[np.ndarray, "M D"],
    gate: Float[np.ndarray, "E D F"],
    up: Float[np.ndarray, "E D F"],
    down: Float[np.ndarray, "E F D"],
    group_sizes: Int[np.ndarray, "E"],
    weights: Float[np.ndarray, "M"],
    d_y: Float[np.ndarray, "M D"],
) -> ExpertsResult:
    """Return y = w down_e(silu(gate_e x) * up_e x) of rows sorted by expert, and the gradients."""
    x, gate, up, down, w, d_y = (
        a.astype(np.float64) for a in (rows, gate, up, down, weights[:, None], d_y)
    )
    y, d_x, d_w = np.zeros_like(x), np.zeros_like(x), np.zeros(len(x))
    d_gate, d_up, d_down = (np.zeros_like(matrices) for matrices in (gate, up, down))
    ends = np.cumsum(group_sizes)
    for e, (start, end) in enumerate(zip(ends - group_sizes, ends, strict=True)):
        part = slice(start, end)
        g, u = x[part] @ gate[e], x[part] @ up[e]
        sigmoid = 1 / (1 + np.exp(-g))
        unweighted = g * sigmoid * u
        hidden = unweighted * w[part]
        y[part] = hidden @ down[e]
        d_hidden = d_y[part] @ down[e].T
        d_w[part] = np.sum(d_hidden * unweighted, 1)
        d_g = d_hidden * w[part] * u * sigmoid * (1 + g * (1 - sigmoid))
        d_u = d_hidden * w[part] * g * sigmoid
        d_x[part] = d_g @ gate[e].T + d_u @ up[e].T
        d_gate[e], d_up[e], d_down[e] = x[part].T @ d_g, x[part].T @ d_u, hidden.T @ d_y[part]
    return ExpertsResult(y, d_x, d_gate, d_up, d_down, d_w)


# ---- measures of errors


def relative_error(actual, expected: np.ndarray) -> float:
    """Return |actual - expected| / |expected| (L2), in float64."""
    difference = to_float64(actual) - expected
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-300))


def worst_head_error(actual, expected: np.ndarray, num_heads: int) -> float:
    """Return the largest relative error of any head of [B, T, N * S].

    By head, because slow heads, whose numbers are large, would hide the others.
    """
    split = (*expected.shape[:2], num_heads, -1)
    actual, expected = to_float64(actual).reshape(split), expected.reshape(split)
    return max(
        relative_error(actual[:, :, head], expected[:, :, head]) for head in range(num_heads)
    )


def worst_state_error(actual, expected: np.ndarray) -> float:
    """Return the largest relative error of any head of states [B, N, H, H]."""
    actual = to_float64(actual)
    return max(
        relative_error(actual[:, head], expected[:, head]) for head in range(expected.shape[1])
    )


def to_float64(array) -> np.ndarray:
    """Return an array of any dtype on the host, in float64."""
    return np.asarray(array).astype(np.float64)

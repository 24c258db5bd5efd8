"""The float64 oracle of lightning attention and its error measures, for tests of every kernel."""

import numpy as np

# The release's fastest and slowest head, one between, and what a lightning last layer would have.
SLOPES = np.array([0.917, 0.0039, 4.949e-5, 3.9e-8], np.float32)


def recurrence(qkv, slopes, segment_ids, state):
    """Return (o [B, T, N * H], state) by the definition, one row, head and token at a time."""
    batch, length, width = qkv.shape
    heads = len(slopes)
    size = width // (3 * heads)
    x = np.asarray(qkv).astype(np.float64).reshape(batch, length, heads, 3, size)
    state = np.asarray(state).astype(np.float64)  # a copy
    o = np.zeros((batch, length, heads, size))
    for b in range(batch):
        document = None
        for t in range(length):
            if segment_ids is not None:
                if segment_ids[b, t] == 0:
                    continue
                if document not in (None, segment_ids[b, t]):
                    state[b] = 0
                document = segment_ids[b, t]
            for h in range(heads):
                q, k, v = x[b, t, h]
                state[b, h] = np.exp(-np.float64(slopes[h])) * state[b, h] + np.outer(k, v)
                o[b, t, h] = q @ state[b, h]
    return o.reshape(batch, length, -1), state


def worst_head(got, wanted, heads):
    """Largest relative L2 error of any head of outputs [..., N * H].

    Per head, because slow heads, whose outputs are large, would hide the others.
    """
    split = (*wanted.shape[:-1], heads, -1)
    got, wanted = (np.asarray(x).astype(np.float64).reshape(split) for x in (got, wanted))
    axes = tuple(i for i in range(got.ndim) if i != got.ndim - 2)
    return np.max(np.sqrt(np.sum((got - wanted) ** 2, axes) / np.sum(wanted**2, axes)))


def worst_state(got, wanted):
    """Largest relative L2 error of any head of states [B, N, H, H]."""
    got, wanted = (np.asarray(x).astype(np.float64) for x in (got, wanted))
    error = np.sqrt(np.sum((got - wanted) ** 2, (0, 2, 3)) / np.sum(wanted**2, (0, 2, 3)))
    return np.max(error)

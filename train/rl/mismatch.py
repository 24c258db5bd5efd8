"""How far sampler and trainer are apart on the same tokens and weights (M1 3.2)."""

import math
from collections.abc import Iterable

import numpy as np


def measure_mismatch(samples: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return how far the log-probabilities of samples are apart.

    Here d = logp_old - logp_rollout, and p = exp(logp) of the trainer, q of the sampler. Samples
    are measured one after another, because float64 copies of a whole batch would be many times as
    large as the batch.

    Args:
      samples: (logp_rollout, logp_old) of each sample, by the sampler and by the trainer, [tokens]
        each. Only tokens that the model wrote.

    Returns:
      pearson: correlation of p and q (Figure 3), NaN if either is constant.
      probability_gap_mean, probability_gap_max: mean and maximum of |p - q|.
      logp_gap_mean, logp_gap_max: mean and maximum of |d|, nats.
      k1: -mean d, which estimates KL(sampler || trainer), nats.
      k3: mean(exp d - 1 - d), an estimate of the same that is never negative.
      chi2_token: mean(exp 2d) - 1, the chi-square divergence.
      chi2_sequence: the same with the sum of d over each sample.
      perplexity_ratio: exp(-mean d), the trainer's perplexity over the sampler's.

    Raises:
      ValueError: no token at all.
    """
    moments, sums, sequences = _ProbabilityMoments(), np.zeros(5), []
    gap_max, logp_gap_max = 0.0, 0.0
    for logp_rollout, logp_old in samples:
        if not len(logp_rollout):
            continue
        # In float64: the gaps are near float32's rounding.
        rollout, trainer = (np.asarray(x, np.float64) for x in (logp_rollout, logp_old))
        d, p, q = trainer - rollout, np.exp(trainer), np.exp(rollout)
        moments.add(p, q)
        gaps, logp_gaps = np.abs(p - q), np.abs(d)
        gap_max, logp_gap_max = max(gap_max, gaps.max()), max(logp_gap_max, logp_gaps.max())
        terms = (d, gaps, logp_gaps, np.expm1(d) - d, np.exp(2 * d))
        sums += [term.sum() for term in terms]
        sequences.append(d.sum())
    if not sequences:
        raise ValueError("mismatch: got no token that the model wrote; wanted at least one")
    d_mean, gap_mean, logp_gap_mean, k3, square = sums / moments.count
    # Clipped, as exp(2 * 20) is useless already, and a longer sum would be infinite.
    sequence = np.clip(sequences, -20, 20)
    values = {
        "pearson": moments.correlation(),
        "probability_gap_mean": gap_mean,
        "probability_gap_max": gap_max,
        "logp_gap_mean": logp_gap_mean,
        "logp_gap_max": logp_gap_max,
        "k1": -d_mean,
        "k3": k3,
        "chi2_token": square - 1,
        "chi2_sequence": np.mean(np.exp(2 * sequence)) - 1,
        "perplexity_ratio": np.exp(-d_mean),
    }
    return {name: float(value) for name, value in values.items()}


class _ProbabilityMoments:
    """Means, variances and the covariance of pairs (p, q) that come in parts.

    Attributes:
      count: pairs so far.
    """

    def __init__(self):
        self.count = 0
        self._mean = np.zeros(2)
        # Sums of the products of distances from the mean, [[pp, pq], [pq, qq]].
        self._products = np.zeros((2, 2))

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """Take more pairs, [n] each."""
        pairs = np.stack([p, q])
        mean = pairs.mean(1)
        pairs -= mean[:, None]
        # Sums about two means, joined about the common mean (Chan, Golub and LeVeque 1979).
        # Raw sums of squares would cancel.
        shift, total = mean - self._mean, self.count + len(p)
        self._products += pairs @ pairs.T + np.outer(shift, shift) * (self.count * len(p) / total)
        self._mean += shift * (len(p) / total)
        self.count = total

    def correlation(self) -> float:
        """Return the correlation, NaN if p or q is constant."""
        spread = math.sqrt(self._products[0, 0]) * math.sqrt(self._products[1, 1])
        return self._products[0, 1] / spread if spread else math.nan

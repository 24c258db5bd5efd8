"""Named workloads that tests, schedules and benchmarks share."""

import dataclasses

import numpy as np
from jaxtyping import Int

SEED = 0


@dataclasses.dataclass(frozen=True)
class TrainingShape:
    """One training call."""

    batch_size: int  # rows
    length: int  # tokens of a row
    num_heads: int
    head_dim: int = 128
    dtype: str = "bfloat16"  # of qkv
    # How documents lie in a row, a key of `DOCUMENT_PATTERNS`. None: one document.
    document_pattern: str | None = None

    def segment_ids(self) -> Int[np.ndarray, "B T"] | None:
        """Return the documents' ids, from 1, the same on every call and in every row."""
        if self.document_pattern is None:
            return None
        lengths = DOCUMENT_PATTERNS[self.document_pattern](self.length)
        ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        return np.tile(ids, (self.batch_size, 1))


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """One decoding step."""

    batch_size: int  # sequences
    num_heads: int = 64
    head_dim: int = 128
    dtype: str = "bfloat16"  # of qkv
    chunk_tokens: int = 64  # tokens between two moves of the state
    attention_tile: int = 8  # rows of a tile, one of which is the token

    def slots(self) -> Int[np.ndarray, "B"]:
        """Return the sequences' slots in a fixed random order. The memory has no other slots."""
        return np.random.default_rng(SEED).permutation(self.batch_size).astype(np.int32)


def equal_document_lengths(length: int) -> Int[np.ndarray, "documents"]:
    """Return the lengths of 16 equal documents. The last takes the remaining tokens too."""
    ends = np.append(np.arange(1, 16) * (length // 16), length)
    return np.diff(ends, prepend=0)


def lognormal_document_lengths(length: int) -> Int[np.ndarray, "documents"]:
    """Return log-normal lengths of mean 2,048 and sigma 1. The last document is cut off."""
    rng = np.random.default_rng(SEED)
    # exp(mu + sigma^2 / 2) is the mean. More lengths are drawn than a row can need.
    drawn = rng.lognormal(np.log(2048) - 0.5, 1.0, max(16, length // 64)).astype(int) + 1
    ends = np.minimum(np.cumsum(drawn), length)
    return np.diff(ends[: np.argmax(ends == length) + 1], prepend=0)


def short_document_lengths(length: int) -> Int[np.ndarray, "documents"]:
    """Return lengths of documents cut every 128 tokens, each cut moved by up to 32 tokens."""
    cuts = np.arange(128, length, 128)
    cuts = cuts + np.random.default_rng(SEED).integers(-32, 33, len(cuts))
    return np.diff(np.append(cuts, length), prepend=0)


DOCUMENT_PATTERNS = {
    "equal": equal_document_lengths,
    "lognormal": lognormal_document_lengths,
    "short": short_document_lengths,
}

TRAINING_SHAPES = {
    # The static schedule counts this one: full superblocks, whole head blocks, no boundary.
    "schedule": TrainingShape(1, 8192, 16),
    "cpu_smoke": TrainingShape(1, 256, 2, 64, "float32"),
    "cpu_smoke_packed": TrainingShape(1, 512, 2, 64, "float32", "short"),
    "2k": TrainingShape(1, 2048, 64),
    "8k": TrainingShape(1, 8192, 64),
    "32k": TrainingShape(1, 32768, 64),
    "64k": TrainingShape(1, 65536, 64),
    "64k_equal": TrainingShape(1, 65536, 64, document_pattern="equal"),
    "64k_lognormal": TrainingShape(1, 65536, 64, document_pattern="lognormal"),
    "64k_short": TrainingShape(1, 65536, 64, document_pattern="short"),
    "128k": TrainingShape(1, 131072, 64),
    "1m": TrainingShape(1, 1 << 20, 8),
    "two_rows": TrainingShape(2, 8192, 64),
    "few_heads": TrainingShape(1, 65536, 8),
}
DECODE_SHAPES = {
    # 64 heads over eight devices.
    "schedule": DecodeShape(64, 8),
    **{f"decode_{batch}": DecodeShape(batch) for batch in (1, 8, 32, 64, 128, 256)},
    **{f"decode_{batch}_few_heads": DecodeShape(batch, 8) for batch in (1, 8, 32, 64, 128, 256)},
}

"""Named workloads that tests, schedules and benchmarks share (kernels.md section 7)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: rows, tokens of a row, heads, width of a head, dtype of qkv."""

    batch: int
    length: int
    heads: int
    head_dim: int = 128
    dtype: str = "bfloat16"


SHAPES = {
    # What the static schedule counts: full superblocks, whole head blocks, no boundary.
    "schedule": Shape(1, 8192, 16),
    "2k": Shape(1, 2048, 64),
    "8k": Shape(1, 8192, 64),
    "32k": Shape(1, 32768, 64),
    "64k": Shape(1, 65536, 64),
    "128k": Shape(1, 131072, 64),
    "1m": Shape(1, 1 << 20, 8),
    "two_rows": Shape(2, 8192, 64),
    "few_heads": Shape(1, 65536, 8),
}

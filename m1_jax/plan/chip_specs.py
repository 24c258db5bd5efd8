"""What a TPU generation can do at best: the numbers that predicted times are made of."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChipSpec:
    """Peaks of one JAX device, which on tpu7x is half a chip.

    Attributes:
      flops_per_sec: bfloat16 products.
      hbm_bytes_per_sec: memory bandwidth.
      clock_hz: of the TensorCore. The compiler's estimates are in its cycles.
      link_bytes_per_sec: one link to a neighbour, one way. On v5p the compiler's own scheduler
        counts 93 GB/s for it (187 GB/s for a gather in one dimension, which uses two links).
      num_tensor_cores: cores that a program on the device has.
      lightning_nanos: time of the training kernels of lightning attention for one token and head on
        one TensorCore, (forward, backward), from their static schedules (docs/log.md).
      paged_attention_ratio: time of serving's softmax kernel over its HBM time, from its static
        schedule with 64 rows of 4,096 tokens (docs/log.md).
      lightning_serving_ratio: the same of serving's lightning kernel, and 1 where HBM bounds it.
    """

    flops_per_sec: float
    hbm_bytes_per_sec: float
    clock_hz: float
    link_bytes_per_sec: float
    num_tensor_cores: int
    lightning_nanos: tuple[float, float]
    paged_attention_ratio: float
    lightning_serving_ratio: float


# By generation, as in `topology.TPU_GENERATIONS`. Peaks are the published ones.
CHIP_SPECS = {
    "v5e": ChipSpec(197e12, 819e9, 1.5e9, 45e9, 1, (0.86, 2.06), 1.31, 1.0),
    "v5p": ChipSpec(459e12, 2765e9, 1.75e9, 90e9, 2, (0.73, 1.77), 1.94, 1.05),
    "v6e": ChipSpec(918e12, 1640e9, 1.75e9, 90e9, 1, (0.45, 1.10), 2.07, 1.19),
    "tpu7x": ChipSpec(1153e12, 3690e9, 2.2e9, 90e9, 1, (0.35, 0.88), 3.62, 2.06),
}

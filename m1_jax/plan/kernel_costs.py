"""The time of a custom call: Pallas kernels, XLA's grouped matmul, and the compiler's own calls.

Our own kernels are priced by name, from their static schedules, and the grouped matmul by its tile.
Any other kernel has the `cost_estimate` that its author gave. Without one, the bytes of its
operands and results are the only thing known, and the report names the kernel.
"""

import math
import re
from collections.abc import Mapping

from m1_jax import splash_attention
from m1_jax.plan import chip_specs, hbm_traffic, hlo, instruction_costs, time_assumptions

# Of the peaks: a grouped matmul that HBM does not bound, softmax kernels, and copies by the
# compiler's own calls.
GROUPED_FLOPS_SHARE, SOFTMAX_FLOPS_SHARE, CUSTOM_HBM_SHARE = 0.85, 0.5, 0.8
# Products of a pair of a query and a key, in units of 2 H operations, by the softmax kernel's part.
_SPLASH_PRODUCTS = {"dkv": 4, "dq": 3, "fwd": 2}
_MOSAIC_TARGET = "tpu_custom_call"
# Calls of the compiler that move nothing.
_FREE_TARGETS = ("AssumeGather", "GatherScatter", "AllocateBuffer", "TODO")
_METADATA_SECS = 2e-6  # of the grouped matmul's small kernel that sorts tiles by group
# HBM bytes of the lightning kernels for a token and head of 128: q, k, v, o and their gradients.
_LIGHTNING_BYTES = {"fwd": 1088, "bwd": 1856}
_STORED_BYTES = 32  # of a column: rows of keys that a tile stores, in whole tiles of the layout
_LIGHTNING_HEAD_COLUMNS = 384  # q, k and v of a head, fused


class KernelPricer:
    """Prices the custom calls of one module."""

    def __init__(
        self,
        module: hlo.HloModule,
        chip: chip_specs.ChipSpec,
        assumptions: time_assumptions.TimeAssumptions,
    ):
        self._module, self._chip, self._assumptions = module, chip, assumptions
        self._traffic = hbm_traffic.TrafficCounter(module)
        self.unknown_kernels: set[str] = set()

    def price(
        self, computation: str, call: hlo.HloInstruction, source_kind: str | None
    ) -> instruction_costs.InstructionCost:
        """Return the cost of a custom call.

        Args:
          source_kind: the kind of the module that it came from, if that has one.
        """
        attributes = call.operands_and_attributes
        num_bytes = self._traffic.count_bytes(computation, call)
        match = re.search(r'custom_call_target="([^"]*)"', attributes)
        target = match[1] if match else ""
        if target != _MOSAIC_TARGET:
            is_free = target.startswith(_FREE_TARGETS)
            secs = 0.0 if is_free else self._hbm_secs(num_bytes) / CUSTOM_HBM_SHARE
            return _make_cost(source_kind or "other calls", secs, num_bytes, target)
        if "ragged_dot_tiling" in attributes:
            return self._price_grouped(computation, call)
        if "metadata" in call.name and source_kind in (None, "experts"):
            return _make_cost("experts", _METADATA_SECS, 0.0, "metadata of groups")
        name = re.sub(r"[.0-9]+$", "", call.name)
        if name.startswith("lightning") and name.endswith(tuple(_LIGHTNING_BYTES)):
            return self._price_lightning(computation, call, name[-3:], num_bytes)
        if name.startswith("splash"):
            return self._price_splash(computation, call, name, num_bytes)
        if name == "paged_attention" and self._assumptions.num_cached_tokens is not None:
            return self._price_paged_attention(computation, call)
        if name == "lightning_serving":
            return self._price_lightning_serving(computation, call)
        return self._price_by_estimate(call, name, source_kind, num_bytes)

    def _hbm_secs(self, num_bytes: float) -> float:
        return num_bytes / self._chip.hbm_bytes_per_sec

    def _operand_arrays(self, computation: str, call: hlo.HloInstruction) -> list[hlo.HloArray]:
        body: Mapping[str, hlo.HloInstruction] = self._module.computations[computation]
        shapes = (body[name].shape for name in call.operand_names if name in body)
        return [array for shape in shapes for array in hlo.parse_arrays(shape)]

    def _price_grouped(
        self, computation: str, call: hlo.HloInstruction
    ) -> instruction_costs.InstructionCost:
        """Return the larger of the time for products and that for traffic.

        Rows [M, K] times matrices [G, K, N], or [G, N, K] transposed. In the matrices' gradient,
        rows [M, K] and [M, N] make [G, K, N]. A tile of rows is read again for every tile of
        columns.
        """
        match = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', call.operands_and_attributes)
        assert match is not None, call
        tile_rows, tile_inner, tile_columns = map(int, match.groups())
        arrays = self._operand_arrays(computation, call)
        left, right = [array for array in arrays if len(array.dims) >= 2][-2:]
        result = hlo.parse_arrays(hlo.split_tuple_shape(call.shape)[0])[0]
        rows = float(left.dims[0])
        if self._assumptions.num_expert_rows is not None:
            rows = min(rows, self._assumptions.num_expert_rows)
        inner, columns = left.dims[1], result.dims[-1]
        column_tiles = math.ceil(columns / tile_columns)
        row_bytes = left.num_bytes / left.size
        if len(result.dims) == 2:
            num_groups = right.dims[0]
            num_busy = self._assumptions.num_busy_experts or num_groups
            num_busy = min(num_groups, num_busy, rows)
            num_tiles = max(math.ceil(rows / tile_rows), num_busy)
            # A matrix's tile stays only while all of K is in it.
            num_reads = num_tiles if tile_inner < inner else num_busy
            num_bytes = row_bytes * rows * (inner * column_tiles + columns)
            num_bytes += right.num_bytes / num_groups * num_reads
        else:
            inner_tiles = math.ceil(inner / tile_inner)
            num_bytes = row_bytes * rows * (inner * column_tiles + columns * inner_tiles)
            num_bytes += hlo.array_bytes(call.shape)
        flops = 2 * rows * inner * columns
        product_secs = flops / (GROUPED_FLOPS_SHARE * self._chip.flops_per_sec)
        hbm_secs = self._hbm_secs(num_bytes)
        bound = "HBM" if hbm_secs > product_secs else "MXU"
        detail = f"grouped, {bound} bound, tile {tile_rows},{tile_inner},{tile_columns}"
        return _make_cost("experts", max(product_secs, hbm_secs), num_bytes, detail)

    def _price_lightning(
        self, computation: str, call: hlo.HloInstruction, part: str, num_bytes: float
    ) -> instruction_costs.InstructionCost:
        """Return the time of a training kernel, whose first bfloat16 operand is q, k, v fused."""
        arrays = self._operand_arrays(computation, call)
        fused = next(array for array in arrays if array.dtype == "bf16")
        nanos = self._chip.lightning_nanos[part == "bwd"] / self._chip.num_tensor_cores
        secs = max(nanos * 1e-9, self._hbm_secs(_LIGHTNING_BYTES[part]))
        return _make_cost(
            "lightning attention", fused.size / _LIGHTNING_HEAD_COLUMNS * secs, num_bytes, "kernel"
        )

    def _price_splash(
        self, computation: str, call: hlo.HloInstruction, name: str, num_bytes: float
    ) -> instruction_costs.InstructionCost:
        """Return the time of a part of jax's splash attention, which skips blocks of the future."""
        # Queries [.., heads, T, H] come before keys [.., kv heads, S, H].
        wide = [a for a in self._operand_arrays(computation, call) if a.dtype == "bf16"]
        queries, keys = wide[0], wide[1]
        products = next((n for part, n in _SPLASH_PRODUCTS.items() if part in name), 2)
        num_blocks = math.ceil(keys.dims[-2] / splash_attention.BLOCK_TOKENS)
        causal_share = (num_blocks + 1) / (2 * num_blocks)
        pairs = queries.size / queries.dims[-1] * keys.dims[-2] * causal_share
        flops = 2 * products * pairs * queries.dims[-1]
        secs = flops / (SOFTMAX_FLOPS_SHARE * self._chip.flops_per_sec)
        secs = max(secs, self._hbm_secs(num_bytes))
        return _make_cost("softmax attention", secs, num_bytes, "kernel")

    # The serving kernels have the memory of all sequences as operands, and read a part of it.

    def _count_tiles(self, num_tiles: int) -> int:
        return min(num_tiles, self._assumptions.num_running_rows or num_tiles)

    def _price_paged_attention(
        self, computation: str, call: hlo.HloInstruction
    ) -> instruction_costs.InstructionCost:
        """Return the time of tiles [I, K, G t, H] over caches [R, J, pages, K, C, H]."""
        arrays = self._operand_arrays(computation, call)
        queries = next(array for array in arrays if len(array.dims) == 4)
        keys = next(array for array in arrays if len(array.dims) == 6)
        num_tiles, num_kv, _, size = queries.dims
        tokens = self._assumptions.num_cached_tokens or 0
        row_bytes = 2 * num_kv * size * keys.num_bytes / keys.size  # of a token's key and value
        num_bytes = self._count_tiles(num_tiles) * tokens * row_bytes + 2 * queries.num_bytes
        secs = self._chip.paged_attention_ratio * self._hbm_secs(num_bytes)
        return _make_cost("softmax attention", secs, num_bytes, "kernel")

    def _price_lightning_serving(
        self, computation: str, call: hlo.HloInstruction
    ) -> instruction_costs.InstructionCost:
        """Return the time of tiles [I, t, N 3 H] over states [.., N, H, H] and keys [.., C, H]."""
        arrays = self._operand_arrays(computation, call)
        qkv = next(array for array in arrays if len(array.dims) == 3)
        states, keys = [array for array in arrays if len(array.dims) == 6][:2]
        num_heads, chunk, size = keys.dims[3:]
        item_bytes = keys.num_bytes / keys.size
        state_bytes = size * size * states.num_bytes / states.size
        # A state is read by each tile, and written by one in C.
        head_bytes = state_bytes * (1 + 1 / chunk) + 2 * chunk * size * item_bytes
        head_bytes += 2 * size * _STORED_BYTES
        num_bytes = self._count_tiles(qkv.dims[0]) * num_heads * head_bytes + 4 / 3 * qkv.num_bytes
        secs = self._chip.lightning_serving_ratio * self._hbm_secs(num_bytes)
        return _make_cost("lightning attention", secs, num_bytes, "kernel")

    def _price_by_estimate(
        self, call: hlo.HloInstruction, name: str, source_kind: str | None, num_bytes: float
    ) -> instruction_costs.InstructionCost:
        kind = source_kind or "other kernels"
        estimate = parse_cost_estimate(call.operands_and_attributes)
        if estimate is None:
            self.unknown_kernels.add(name)
            return _make_cost(kind, self._hbm_secs(num_bytes), num_bytes, f"{name}, by its bytes")
        flops, estimated_bytes = estimate
        secs = max(flops / self._chip.flops_per_sec, self._hbm_secs(estimated_bytes))
        return _make_cost(kind, secs, estimated_bytes, f"{name}, by its cost estimate")


def parse_cost_estimate(attributes: str) -> tuple[float, float] | None:
    """Return the operations and HBM bytes that a kernel's author gave as `pl.CostEstimate`."""
    match = re.search(r'\\?"cost_estimate\\?":\s*\{([^}]*)\}', attributes)
    if not match:
        return None
    numbers = {
        key: float(number) for key, number in re.findall(r'\\?"(\w+)\\?":\s*\\?"?(\d+)', match[1])
    }
    if not numbers:
        return None
    return numbers.get("flops", 0.0), numbers.get("bytes_accessed", 0.0)


def _make_cost(
    kind: str, secs: float, num_bytes: float, detail: str
) -> instruction_costs.InstructionCost:
    return instruction_costs.InstructionCost(kind, secs, secs, num_bytes, detail)

"""What a job knows and its compiled program does not: how long loops are that depend on data.

A prediction of time prints these assumptions. A loop that none of them covers counts once, and the
report names it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from m1_jax import config as config_lib
from m1_jax import ring_attention, sharding
from m1_jax.plan import estimate, source_frames
from m1_jax.serving import ragged_batch
from m1_jax.serving import softmax as serving_softmax

# An exchange on a torus: mean hops along the longest side of its group.
EXCHANGE_HOPS = 2.0


@dataclasses.dataclass(frozen=True)
class TimeAssumptions:
    """What one job assumes of its data.

    Attributes:
      loop_trips: by module, or by module and function, how often a loop there runs.
      branch_shares: by module, or by module and function, the share of conditionals there that take
        the dearer branch.
      num_expert_rows: rows that a device's experts have in one layer. None: all of the buffer.
      num_busy_experts: experts of a device that have rows in one layer. None: all.
      num_running_rows: rows of a device that decode, each a tile of its own. None: all tiles.
      num_cached_tokens: tokens in the cache of a row that decodes. None: not a serving job.
      notes: the same in words, as the report prints it.
    """

    loop_trips: Mapping[str, float] = dataclasses.field(default_factory=dict)
    branch_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    num_expert_rows: float | None = None
    num_busy_experts: float | None = None
    num_running_rows: int | None = None
    num_cached_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def find_trips(self, frames: Sequence[source_frames.SourceFrame]) -> float | None:
        """Return how often a loop of unknown length runs, and None where nothing tells.

        Only the innermost of our own calls counts: it is where the loop is written.
        """
        return _find_by_frame(self.loop_trips, frames[:1])

    def find_branch_share(self, frames: Sequence[source_frames.SourceFrame]) -> float:
        """Return the share of a conditional's runs that take its dearer branch."""
        share = _find_by_frame(self.branch_shares, frames)
        return 1.0 if share is None else share


def _find_by_frame(
    values: Mapping[str, float], frames: Sequence[source_frames.SourceFrame]
) -> float | None:
    for frame in frames:
        for key in (f"{frame.module}.{frame.function}", frame.module):
            if key in values:
                return values[key]
    return None


def make_assumptions(
    config: config_lib.ModelConfig, job: estimate.PlanJob, layout: sharding.MeshLayout
) -> TimeAssumptions:
    """Return what a job's programs assume: a balanced router, and rows that are full."""
    if job.kind == "reshard":  # it computes nothing
        return TimeAssumptions()
    num_blocks = max(job.seq // ring_attention.TPU_BLOCK_TOKENS, 1)
    causal_share = (num_blocks + 1) / (2 * num_blocks)
    # Where gradients are computed, the first round is written out, and the others are a loop and a
    # conditional. A custom gradient's instructions name the line that calls it.
    loop_trips: dict[str, float] = {
        "m1_jax.expert_exchange.run_routed_experts": 0,
        "m1_jax.expert_exchange": 1,
    }
    notes = ["a balanced router: one round of the exchange"]
    rows = cached_tokens = None
    if job.kind == "serve":
        rows, cached_tokens = max(job.batch // layout.axis_size("batch"), 1), job.seq
        key_blocks = max(-(-job.seq // serving_softmax.BLOCK_KEYS), 1)
        # In decoding, each row is a tile.
        tile_groups = -(-rows // ragged_batch.TILE_GROUP)
        loop_trips |= {
            "m1_jax.serving.ragged_batch.scan_attention_tiles": rows,
            "m1_jax.serving.ragged_batch.map_row_tiles": math.ceil(
                rows / ragged_batch.ACCELERATOR_MATMUL_TILE
            ),
            "m1_jax.serving.ragged_batch": tile_groups,
            "m1_jax.serving.softmax": key_blocks,
            "infer.execution.programs": 1,
            # A bisection of 32 bits.
            "infer.execution.sampling": 32,
        }
        notes += [
            f"{job.batch} running rows of {job.seq} tokens, {rows} a device, one token each",
            "every option of sampling in use: each conditional takes its dearer branch",
        ]
    elif job.new_tokens > 1:
        notes.append(f"causal rows of {job.seq} tokens: {causal_share:.0%} of the blocks have keys")
    num_tokens = job.batch * job.new_tokens / job.accumulate  # of all devices, in one pass
    expert_rows = num_tokens * config.num_experts_per_tok / layout.axis_size("tokens")
    notes.append(f"{expert_rows:,.0f} rows at a device's experts in a layer")
    num_local_experts = config.num_local_experts / layout.axis_size("experts")
    # Tokens meet at a device's experts from its group, not from the other groups.
    group_rows = expert_rows * layout.axis_size("experts")
    busy_experts = num_local_experts * (1 - (1 - 1 / config.num_local_experts) ** group_rows)
    if busy_experts < 0.995 * num_local_experts:
        notes.append(f"{busy_experts:.2f} of a device's {num_local_experts:g} experts have rows")
    return TimeAssumptions(
        loop_trips=loop_trips,
        branch_shares={
            "m1_jax.ring_attention": causal_share,
            "m1_jax.expert_exchange.run_routed_experts": 0.0,
        },
        num_expert_rows=expert_rows,
        num_busy_experts=busy_experts,
        num_running_rows=rows,
        num_cached_tokens=cached_tokens,
        notes=tuple(notes),
    )

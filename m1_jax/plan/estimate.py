"""What a job should need, by arithmetic: bytes on a chip, and bytes that it receives.

Exact where it can be (parameters, optimizer, states: from their shardings), an estimate for what
the compiler decides (activations). `report.py` prints these numbers beside the compiler's.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from m1_jax import config as config_lib
from m1_jax import exchange_plan, expert_exchange, logprobs, sharding
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax.plan import collectives as collectives_lib

LATENCY_BYTES = 2**20  # what the network could carry while a collective starts
HBM_TO_NETWORK_RATIO = 5  # bandwidths of a v5p chip: 2,765 and 600 GB/s
# Bytes of a number.
BFLOAT16_BYTES, _FLOAT32 = 2, 4

# Parameter shardings of the jobs that are not called like theirs.
_MODES_BY_JOB = {"serve": sharding.DECODE, "rl_update": sharding.TRAIN, "reshard": sharding.TRAIN}


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """A job and the sizes of its rows.

    Attributes:
      kind: train (a whole optimizer step), prefill, decode, serve (the engine's decoding),
        rl_update (one microbatch and the step) or reshard, which has no rows.
      seq: tokens a row. In decode and serve, tokens that a row's cache has room for.
      batch: rows of all chips.
      accumulate: microbatches of a training step.
    """

    kind: str
    seq: int
    batch: int
    accumulate: int = 1

    @property
    def is_training(self) -> bool:
        return self.kind in ("train", "rl_update")

    @property
    def new_tokens(self) -> int:
        """Tokens of a row that one pass computes."""
        return 1 if self.mode == sharding.DECODE else self.seq

    @property
    def mode(self) -> str:
        """How its parameters are sharded: a key of `sharding.PARAM_RULES`."""
        return _MODES_BY_JOB.get(self.kind, self.kind)


@dataclasses.dataclass(frozen=True)
class ResourceEstimate:
    """What a program needs of one chip in one run.

    Attributes:
      hbm_bytes: bytes of HBM by part, like parameters or activations.
      collectives: what the chip receives, by kind of collective.
    """

    hbm_bytes: Mapping[str, float]
    collectives: Mapping[str, collectives_lib.CollectiveTraffic]

    @property
    def total_bytes(self) -> float:
        return sum(self.hbm_bytes.values())

    def cost(self, job: PlanJob) -> float:
        """Return what meshes are ranked by: time, in bytes received.

        A collective waits for about 1 MiB however small it is. Serving reads all weights and
        states in each pass, which training hides behind its products.
        """
        traffic = sum(t.bytes + t.count * LATENCY_BYTES for t in self.collectives.values())
        return traffic if job.is_training else traffic + self.total_bytes / HBM_TO_NETWORK_RATIO


@dataclasses.dataclass(frozen=True)
class ParamShard:
    """One parameter's part on a chip.

    Attributes:
      num_elements: elements on the chip, of all layers of the stack.
      item_bytes: bytes of an element.
      num_layers: layers of its stack. 1 for a parameter outside of the layers.
      gather_group_size: chips that hold the shards of what one chip computes with.
      reduce_group_size: chips that make a gradient of the same elements and do not split them.
    """

    num_elements: int
    item_bytes: int
    num_layers: int
    gather_group_size: int
    reduce_group_size: int


def list_param_shards(model: model_lib.MiniMaxM1, layout: sharding.MeshLayout) -> list[ParamShard]:
    """Return what every parameter of a model of shapes would be on a layout."""
    # Axes that split tokens: each chip along them has a gradient of its own tokens.
    token_axes = {a for a in sharding.ACTIVATION_RULES["tokens"] if layout.mesh.shape[a] > 1}
    shards = []
    for value in params_lib.params_by_path(model).values():
        logical_axes = value.get_metadata()["logical_axes"]
        param_sharding = layout.param_sharding(logical_axes)
        # An entry of a spec is an axis, a tuple of axes, or None.
        split_axes = {
            axis
            for entry in param_sharding.spec
            for axis in ((entry,) if isinstance(entry, str) else entry or ())
        }
        _, fsdp_axes = layout.fsdp_dim_and_axes(logical_axes)
        shards.append(
            ParamShard(
                num_elements=math.prod(param_sharding.shard_shape(value.shape)),
                item_bytes=value.dtype.itemsize,
                # Stacked dimensions come first.
                num_layers=math.prod(value.shape[: logical_axes.count("layers")]),
                gather_group_size=math.prod(layout.mesh.shape[a] for a in fsdp_axes),
                reduce_group_size=math.prod(layout.mesh.shape[a] for a in token_axes - split_axes),
            )
        )
    return shards


def estimate_resources(
    config: config_lib.ModelConfig,
    job: PlanJob,
    layout: sharding.MeshLayout,
    params: Sequence[ParamShard],
    state_bytes: float = 0,
) -> ResourceEstimate:
    """Return what `job` should need on each chip.

    Args:
      params: the shards of all parameters, from `list_param_shards`.
      state_bytes: decode states of a chip, with keys and values.
    """
    rows = job.batch / job.accumulate / layout.axis_size("batch")
    tokens = rows * job.new_tokens / (layout.axis_size("length") if job.new_tokens > 1 else 1)
    parts: dict[str, float] = {"parameters": sum(p.num_elements * p.item_bytes for p in params)}
    if job.is_training:
        num_elements = sum(p.num_elements for p in params)
        parts["optimizer"] = 2 * _FLOAT32 * num_elements  # AdamW's two moments
        parts["gradients"] = _FLOAT32 * num_elements
    parts["activations"] = _estimate_activations(config, job, layout, tokens, params)
    if state_bytes:
        parts["state"] = state_bytes
    return ResourceEstimate(parts, _estimate_collectives(config, job, layout, rows, tokens, params))


def _estimate_activations(
    config: config_lib.ModelConfig,
    job: PlanJob,
    layout: sharding.MeshLayout,
    tokens: float,
    params: Sequence[ParamShard],
) -> float:
    """Estimate what lives besides arguments: saved layer inputs, one layer's work, its weights."""
    layer = BFLOAT16_BYTES * tokens * _count_layer_numbers(config, layout)
    weights = _gathered_layer_bytes(config, params)
    if not job.is_training:
        # Beside the layer, 4 bytes for each number of the residual stream.
        return layer + 2 * weights + 4 * tokens * config.hidden_size
    saved = BFLOAT16_BYTES * tokens * count_saved_numbers(config, layout)
    # A layer's weights twice (the next is on its way), their float32 gradient, backward work.
    return saved + 2.5 * layer + 4 * weights + 3 * _FLOAT32 * logprobs.MAX_LIVE_LOGITS


def count_saved_numbers(config: config_lib.ModelConfig, layout: sharding.MeshLayout) -> float:
    """Return how many numbers of all layers a device keeps of each of its tokens.

    `config.remat` says what the backward pass does not compute again. Numbers are those of the
    computation's dtype.
    """
    layers, embed = config.num_hidden_layers, config.hidden_size
    softmax_layers = config.layer_types.count(config_lib.SOFTMAX)
    width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    if config.remat == "none":
        return layers * _count_layer_numbers(config, layout)
    saved = float(layers * embed)  # the layers' inputs
    if config.remat != "layer":
        saved += layers * embed  # outputs of attention
    if config.remat in ("dots", "products"):
        # Lightning: q, k, v and gate. Softmax: q, k and v.
        projections = 4 * width * (layers - softmax_layers)
        projections += (width + 2 * kv_width) * softmax_layers
        saved += projections / layout.axis_size("heads")
    if config.remat == "products":
        # Gate and up, of a buffer's rows where experts are spread over devices.
        slack = config.expert_capacity or exchange_plan.BUFFER_SLACK
        rows = config.num_experts_per_tok * (slack if layout.axis_size("experts") > 1 else 1.0)
        saved += 2 * layers * rows * config.intermediate_size / layout.axis_size("mlp")
    return saved


def _count_layer_numbers(config: config_lib.ModelConfig, layout: sharding.MeshLayout) -> float:
    """Return how many numbers of a token one layer makes, without rematerialisation."""
    width = config.num_attention_heads * config.head_dim / layout.axis_size("heads")
    embed, hidden = config.hidden_size, config.intermediate_size / layout.axis_size("mlp")
    # Rows of a token in the experts: one for each expert that it goes to.
    expert_rows = config.num_experts_per_tok + config.has_shared_expert
    # Layer's input, norms and output; q, k, v, gate, output twice; rows, gate, up, product, output.
    return 6 * embed + 6 * width + expert_rows * (2 * embed + 3 * hidden)


def _gathered_layer_bytes(config: config_lib.ModelConfig, params: Sequence[ParamShard]) -> float:
    """Return the bytes of one layer's gathered weights, or 0 where nothing is gathered."""
    if all(p.gather_group_size == 1 for p in params):
        return 0
    elements = sum(
        p.num_elements / p.num_layers * p.gather_group_size for p in params if p.num_layers > 1
    )
    # A parameter of each group of equal layers was counted, so this is an average layer.
    return BFLOAT16_BYTES * elements / len(config.layer_groups)


class _TrafficCounter:
    """Sums up collectives by kind.

    Args:
      repeats: how often a step does all that is added.
    """

    def __init__(self, repeats: int):
        self._repeats = repeats
        self._totals: dict[str, list[float]] = {}

    def add(self, kind: str, count: float, size: float) -> None:
        """Add `count` collectives of `size` bytes each. Those of no bytes do not exist."""
        if size and count:
            total = self._totals.setdefault(kind, [0.0, 0.0])
            total[0] += self._repeats * count
            total[1] += self._repeats * count * size

    def traffic(self) -> dict[str, collectives_lib.CollectiveTraffic]:
        return {
            kind: collectives_lib.CollectiveTraffic(*self._totals[kind])
            for kind in collectives_lib.COLLECTIVE_KINDS
            if kind in self._totals
        }


def _estimate_collectives(
    config: config_lib.ModelConfig,
    job: PlanJob,
    layout: sharding.MeshLayout,
    rows: float,
    tokens: float,
    params: Sequence[ParamShard],
) -> dict[str, collectives_lib.CollectiveTraffic]:
    """Count one run by hand. `collectives.count_collectives` says which bytes count as received.

    Args:
      rows: rows of a microbatch on a chip.
      tokens: tokens of a microbatch on a chip.
    """
    counter = _TrafficCounter(job.accumulate)
    _count_param_traffic(counter, job, params)
    _count_expert_traffic(counter, config, job, layout, tokens)
    _count_attention_traffic(counter, config, job, layout, rows, tokens)
    return counter.traffic()


def _count_param_traffic(
    counter: _TrafficCounter, job: PlanJob, params: Sequence[ParamShard]
) -> None:
    """Count ZeRO-3's gathers of weights, and sums of gradients, layer by layer."""
    for p in params:
        layer_elements = p.num_elements / p.num_layers
        foreign_shards = p.gather_group_size - 1
        # Gathered in the forward pass and again in the backward pass.
        num_gathers = p.num_layers * (1 + job.is_training)
        counter.add("all-gather", num_gathers, BFLOAT16_BYTES * layer_elements * foreign_shards)
        if job.is_training:
            counter.add("reduce-scatter", p.num_layers, _FLOAT32 * layer_elements * foreign_shards)
            reduced = 2 * _FLOAT32 * layer_elements * (1 - 1 / p.reduce_group_size)
            counter.add("all-reduce", p.num_layers, reduced)


def _count_expert_traffic(
    counter: _TrafficCounter,
    config: config_lib.ModelConfig,
    job: PlanJob,
    layout: sharding.MeshLayout,
    tokens: float,
) -> None:
    """Count the exchange of rows with their experts, and the routing weights."""
    layers, experts_per_token = config.num_hidden_layers, config.num_experts_per_tok
    num_devices = layout.axis_size("experts")
    takes_all = expert_exchange.takes_all_tokens(round(tokens * num_devices), experts_per_token)
    if takes_all and not job.is_training:
        numbers = tokens * config.hidden_size * (num_devices - 1)
        counter.add("all-gather", layers, BFLOAT16_BYTES * numbers)
        counter.add("reduce-scatter", layers, _FLOAT32 * numbers)
        return
    leaving_share = 1 - 1 / num_devices
    exchanged = BFLOAT16_BYTES * tokens * experts_per_token * config.hidden_size * leaving_share
    # To the experts and back. The backward pass sends rows again, their gradients, and those back.
    counter.add("ragged-all-to-all", (5 if job.is_training else 2) * layers, exchanged)
    # Each chip knows the weights of its group's choices, and gives their gradients back.
    choices = _FLOAT32 * tokens * experts_per_token * (num_devices - 1)
    counter.add("all-gather", layers * (1 + job.is_training), choices)
    counter.add("reduce-scatter", layers * job.is_training, choices)


def _count_attention_traffic(
    counter: _TrafficCounter,
    config: config_lib.ModelConfig,
    job: PlanJob,
    layout: sharding.MeshLayout,
    rows: float,
    tokens: float,
) -> None:
    """Count what tensor parallelism sums, and what context parallelism passes on."""
    layers = config.num_hidden_layers
    lightning_layers = config.layer_types.count(config_lib.LIGHTNING)
    head_shards, length_shards = layout.axis_size("heads"), layout.axis_size("length")
    # A forward pass, its attention again with rematerialisation, and a backward pass.
    forward_passes = 1 if not job.is_training or config.remat == "none" else 2
    passes = forward_passes + job.is_training
    # An all-reduce after attention and one after the experts, each twice (n - 1) / n of its size.
    summed = 2 * BFLOAT16_BYTES * tokens * config.hidden_size * (1 - 1 / head_shards)
    counter.add("all-reduce", 2 * layers * passes, summed)
    # Lightning layers gather the float32 states of all shards of a sequence.
    state = _FLOAT32 * rows * config.num_attention_heads * config.head_dim**2 / head_shards
    counter.add("all-gather", lightning_layers * passes, state * (length_shards - 1))
    # Softmax layers pass keys and values round a ring, in one permutation each.
    kv_width = config.num_key_value_heads * config.head_dim / head_shards
    keys_values = 2 * BFLOAT16_BYTES * tokens * kv_width
    rounds = (layers - lightning_layers) * (length_shards - 1)
    counter.add("collective-permute", 2 * rounds * forward_passes, keys_values / 2)
    if job.is_training:
        # Backward they take their float32 gradients along, twice as many bytes.
        counter.add("collective-permute", 4 * rounds, keys_values * 3 / 4)

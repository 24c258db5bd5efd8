"""What a job should need, by arithmetic: bytes on a chip, bytes received, and meshes worth trying.

Exact where it can be (parameters, optimizer, states: from their shardings), an estimate for what
the compiler decides (activations). `plan.py` prints these numbers beside the compiler's.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from m1_jax import config as config_lib
from m1_jax import logprobs, sharding
from m1_jax import params as params_lib
from m1_jax.plan import hlo

LATENCY_BYTES = 2**20
HBM_TO_NETWORK_RATIO = 5  # bandwidths of a v5p chip: 2,765 and 600 GB/s
# What a search splits devices over; slices meet in the first axis of the mesh.
_SEARCHED_AXES = {
    sharding.TRAIN: ("fsdp", "expert", "tensor", "context"),
    sharding.PREFILL: ("data", "expert", "tensor", "context"),
    sharding.DECODE: ("data", "expert", "tensor", "context"),
    "serve": ("expert", "tensor"),  # all devices hold all rows: see `serving.forward_ragged`
}
_SEARCHED_AXES["rl_update"] = _SEARCHED_AXES[sharding.TRAIN]

_MODES_BY_JOB = {"serve": sharding.DECODE, "rl_update": sharding.TRAIN, "reshard": sharding.TRAIN}


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """kind: train, prefill, decode, serve (the engine's decoding), rl_update (one microbatch and
    the step) or reshard, which has no rows. seq: tokens a row (decode, serve: of cache). batch:
    rows.

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
        """Return how its parameters lie: a key of `sharding.PARAM_RULES`."""
        return _MODES_BY_JOB.get(self.kind, self.kind)


@dataclasses.dataclass(frozen=True)
class ResourceEstimate:
    """Bytes per chip by part, and what one chip receives in one run, by kind of collective."""

    hbm_bytes: Mapping[str, float]
    collectives: Mapping[str, hlo.CollectiveTraffic]

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
    """One parameter's part on a chip: elements, and over how many chips it is gathered or summed.

    gathered: chips that hold the pieces of what one chip computes with. summed: chips that make a
    gradient of the same elements and do not split them.
    """

    num_elements: int
    item_bytes: int
    num_layers: int
    gather_group_size: int
    reduce_group_size: int


def local_bytes(tree) -> int:
    """Return the bytes of a pytree of sharded shapes on one chip, without the padding of tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def list_param_shards(model, layout: sharding.MeshLayout) -> list[ParamShard]:
    """Return what every parameter of a model of shapes would be on a layout."""
    over = {axis for axis in sharding.ACTIVATION_RULES["tokens"] if layout.mesh.shape[axis] > 1}
    found = []
    for value in params_lib.params_by_path(model).values():
        names = value.get_metadata()["logical_axes"]
        where = layout.param_sharding(names)
        split = {
            a for axes in where.spec for a in ((axes,) if isinstance(axes, str) else axes or ())
        }
        _, stored = layout.fsdp_dim_and_axes(names)
        found.append(
            ParamShard(
                num_elements=math.prod(where.shard_shape(value.shape)),
                item_bytes=value.dtype.itemsize,
                num_layers=math.prod(value.shape[: names.count("layers")]),
                gather_group_size=math.prod(layout.mesh.shape[axis] for axis in stored),
                reduce_group_size=math.prod(layout.mesh.shape[axis] for axis in over - split),
            )
        )
    return found


def estimate_resources(
    config: config_lib.ModelConfig,
    job: PlanJob,
    layout: sharding.MeshLayout,
    params: Sequence[ParamShard],
    state_bytes: float = 0,
) -> ResourceEstimate:
    """Return what `job` should need on each chip; `state_bytes`: of decode states."""
    rows = job.batch / job.accumulate / layout.axis_size("batch")
    tokens = rows * job.new_tokens / (layout.axis_size("length") if job.new_tokens > 1 else 1)
    parts: dict[str, float] = {"parameters": sum(p.num_elements * p.item_bytes for p in params)}
    if job.is_training:
        moments = 2 * sum(4 * p.num_elements for p in params)
        parts |= {"optimizer": moments, "gradients": sum(4 * p.num_elements for p in params)}
    parts["activations"] = _estimate_activations(config, job, layout, tokens, params)
    if state_bytes:
        parts["state"] = state_bytes
    return ResourceEstimate(parts, _estimate_collectives(config, job, layout, rows, tokens, params))


def iterate_meshes(
    config: config_lib.ModelConfig, job: PlanJob, devices: Sequence, num_slices: int = 1
) -> Iterator[dict[str, int]]:
    """Yield every mesh of all devices that the model, rows and length can lie on."""
    searched = _SEARCHED_AXES[job.kind]
    for sizes in _iterate_factorizations(len(devices) // num_slices, len(searched)):
        for across in sharding.CROSS_SLICE_AXES if num_slices > 1 else sharding.MESH_AXES[:1]:
            mesh = dict(zip(searched, sizes, strict=True))
            mesh[across] = mesh.get(across, 1) * num_slices
            full = [mesh.get(axis, 1) for axis in sharding.MESH_AXES]
            try:
                layout = sharding.make_layout(
                    Mesh(np.array(devices).reshape(full), sharding.MESH_AXES), config, job.mode
                )
                assert layout is not None
                check_job_layout(job, layout)
            except ValueError:
                continue
            yield {axis: size for axis, size in mesh.items() if size > 1}


def check_job_layout(job: PlanJob, layout: sharding.MeshLayout) -> None:
    """Raise ValueError for rows or lengths that the layout does not split evenly."""
    if job.kind == "reshard":
        return
    sharding.check_batch_rows(layout, job.batch // job.accumulate)
    if job.seq % layout.axis_size("length"):
        raise ValueError(
            f"seq: got {job.seq} tokens over {layout.axis_size('length')} devices along "
            "the length; "
            "wanted a multiple"
        )


def _iterate_factorizations(number: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `number` as an ordered product."""
    if num_factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _iterate_factorizations(number // first, num_factors - 1):
                yield (first, *rest)


def _estimate_activations(
    config, job: PlanJob, layout, tokens: float, params: Sequence[ParamShard]
) -> float:
    """Estimate what lives besides arguments: kept layer inputs, one layer's work, its weights."""
    width = config.num_attention_heads * config.head_dim / layout.axis_size("heads")
    embed, hidden = config.hidden_size, config.intermediate_size / layout.axis_size("mlp")
    slots = config.num_experts_per_tok + config.has_shared_expert
    # Layer's input, norms and output; q, k, v, gate, output twice; rows, gate, up, product, output.
    layer = 2 * tokens * (6 * embed + 6 * width + slots * (2 * embed + 3 * hidden))
    gathered = [
        p.num_elements / p.num_layers * p.gather_group_size
        for p in params
        if p.gather_group_size > 1
    ]
    of_a_layer = [
        p.num_elements / p.num_layers * p.gather_group_size for p in params if p.num_layers > 1
    ]
    weights = 2 * sum(of_a_layer) / len(config.layer_groups) if gathered else 0
    if not job.is_training:
        return layer + 2 * weights + 4 * tokens * embed
    kept = {"none": layer, "layer": 2 * tokens * embed, "dots": layer}[config.remat]
    # A layer's weights twice (the next is on its way), their float32 gradient, backward work.
    return (
        config.num_hidden_layers * kept
        + 2.5 * layer
        + 4 * weights
        + 3 * 4 * logprobs.MAX_LIVE_LOGITS
    )


def _estimate_collectives(
    config, job, layout, rows, tokens, params
) -> dict[str, hlo.CollectiveTraffic]:
    """Return the paper count of one run; see `hlo.count_collectives` for what a byte received is."""
    layers, micro = config.num_hidden_layers, job.accumulate
    lightning = config.layer_types.count(config_lib.LIGHTNING)
    # A forward pass, its attention again with rematerialisation, and a backward pass.
    forward = 1 if not job.is_training or config.remat == "none" else 2
    passes = forward + job.is_training
    found: dict[str, list[float]] = {}

    def add(kind: str, count: float, size: float):
        if size and count:
            entry = found.setdefault(kind, [0.0, 0.0])
            entry[0] += micro * count
            entry[1] += micro * count * size

    for p in params:
        each = p.num_elements / p.num_layers
        add(
            "all-gather", p.num_layers * (1 + job.is_training), 2 * each * (p.gather_group_size - 1)
        )
        if job.is_training:
            add("reduce-scatter", p.num_layers, 4 * each * (p.gather_group_size - 1))
            add("all-reduce", p.num_layers, 8 * each * (1 - 1 / p.reduce_group_size))
    split = 1 - 1 / layout.axis_size("experts")
    exchanged = 2 * tokens * config.num_experts_per_tok * config.hidden_size * split
    # To the experts and back; the backward pass sends rows again, their gradients, and those back.
    add("ragged-all-to-all", (5 if job.is_training else 2) * layers, exchanged)
    # Each chip knows the weights of its group's choices, and gives their gradients back.
    choices = 4 * tokens * config.num_experts_per_tok * (layout.axis_size("experts") - 1)
    add("all-gather", layers * (1 + job.is_training), choices)
    add("reduce-scatter", layers * job.is_training, choices)
    activations = 2 * 2 * tokens * config.hidden_size * (1 - 1 / layout.axis_size("heads"))
    add("all-reduce", 2 * layers * passes, activations)
    others = layout.axis_size("length") - 1
    state = 4 * rows * config.num_attention_heads * config.head_dim**2 / layout.axis_size("heads")
    add("all-gather", lightning * passes, state * others)
    keys = 2 * 2 * tokens * config.num_key_value_heads * config.head_dim / layout.axis_size("heads")
    # Keys and values each way round the ring, and back with their float32 gradients.
    rounds = (layers - lightning) * others
    add("collective-permute", 2 * rounds * forward, keys / 2)
    if job.is_training:
        add("collective-permute", 4 * rounds, keys * 3 / 4)
    return {
        kind: hlo.CollectiveTraffic(*found[kind]) for kind in hlo.COLLECTIVE_KINDS if kind in found
    }

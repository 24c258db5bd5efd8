"""What a job should need, by arithmetic: bytes on a chip, bytes received, and meshes worth trying.

Exact where it can be (parameters, optimizer, states: from their shardings), an estimate for what
the compiler decides (activations). `plan.py` prints these numbers beside the compiler's.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax

from m1_jax import config as config_lib
from m1_jax import hlo, logprobs

# As in sharding.py, whose table of axes this follows.
DATA, FSDP, EXPERT, TENSOR, CONTEXT = AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = (DATA, FSDP, EXPERT)  # rows of a batch are split over these
LATENCY_BYTES = 2**20
HBM_OVER_NETWORK = 5  # bandwidths of a v5p chip: 2,765 and 600 GB/s
# Axes that a job may use, besides `data` across slices.
_SEARCHED = {
    "train": (FSDP, EXPERT, CONTEXT),
    "prefill": (DATA, EXPERT, TENSOR, CONTEXT),
    "decode": (DATA, EXPERT, TENSOR),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """kind: train, prefill or decode. seq: tokens a row (decode: of cache). batch: rows.

    accumulate: microbatches of a training step.
    """

    kind: str
    seq: int
    batch: int
    accumulate: int = 1

    @property
    def training(self) -> bool:
        return self.kind == "train"

    @property
    def new_tokens(self) -> int:
        """Tokens of a row that one pass computes."""
        return 1 if self.kind == "decode" else self.seq


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per chip by part, and what one chip receives in one run, by kind of collective."""

    hbm_bytes: Mapping[str, float]
    collectives: Mapping[str, hlo.Traffic]

    @property
    def total_bytes(self) -> float:
        return sum(self.hbm_bytes.values())

    def cost(self, job: Job) -> float:
        """Return what meshes are ranked by: time, in bytes received.

        A collective waits for about 1 MiB however small it is. Serving reads all weights and
        states in each pass, which training hides behind its products.
        """
        traffic = sum(t.bytes + t.count * LATENCY_BYTES for t in self.collectives.values())
        return traffic if job.training else traffic + self.total_bytes / HBM_OVER_NETWORK


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter's part on a chip: elements, and over how many chips it is gathered or summed.

    gathered: chips that hold the pieces of what one chip computes with. summed: chips that make a
    gradient of the same elements and do not split them.
    """

    elements: int
    item_bytes: int
    layers: int
    gathered: int
    summed: int


def local_bytes(tree) -> int:
    """Return the bytes of a pytree of sharded shapes on one chip, without the padding of tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def param(value, logical_axes: Sequence[str | None]) -> Param:
    """Read a parameter's part from its NamedSharding."""
    sizes, spec = value.sharding.mesh.shape, value.sharding.spec
    split: dict[str, str | None] = {}
    for name, axes in zip(logical_axes, spec, strict=False):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            split[axis] = name
    # Experts and heads are computed where they lie; what else is split is gathered before use.
    kept = {TENSOR} | {axis for axis, name in split.items() if name == "experts"}
    return Param(
        elements=math.prod(value.sharding.shard_shape(value.shape)),
        item_bytes=value.dtype.itemsize,
        layers=value.shape[0] if logical_axes[0] == "layers" else 1,
        gathered=math.prod(sizes[axis] for axis in split if axis not in kept),
        summed=math.prod(
            size for axis, size in sizes.items() if axis not in split and axis != TENSOR
        ),
    )


def estimate(
    config: config_lib.ModelConfig,
    job: Job,
    mesh: Mapping[str, int],
    params: Sequence[Param],
    state_bytes: float = 0,
) -> Estimate:
    """Return what `job` should need on each chip of a mesh; `state_bytes`: of decode states."""
    mesh = dict.fromkeys(AXES, 1) | dict(mesh)
    rows = job.batch / job.accumulate / math.prod(mesh[axis] for axis in BATCH_AXES)
    tokens = max(rows, 1) * job.new_tokens / mesh[CONTEXT]
    held = sum(p.elements * p.item_bytes for p in params)
    parts: dict[str, float] = {"parameters": held}
    if job.training:
        moments = 2 * sum(4 * p.elements for p in params)
        parts |= {"optimizer": moments, "gradients": sum(4 * p.elements for p in params)}
    parts["activations"] = _activations(config, job, mesh, tokens, params)
    if state_bytes:
        parts["state"] = state_bytes
    return Estimate(parts, _collectives(config, job, mesh, rows, tokens, params))


def meshes(
    config: config_lib.ModelConfig, job: Job, num_devices: int, num_slices: int = 1
) -> Iterator[dict[str, int]]:
    """Yield every sensible mesh of all devices: one whose sizes divide what they split."""
    searched = _SEARCHED[job.kind]
    rows = job.batch // job.accumulate
    for sizes in _factors(num_devices // num_slices, len(searched)):
        mesh = dict(zip(searched, sizes, strict=True))
        if num_slices > 1:
            mesh[DATA] = mesh.get(DATA, 1) * num_slices
        full = dict.fromkeys(AXES, 1) | mesh
        divides = (
            config.num_local_experts % full[EXPERT] == 0
            and config.hidden_size % full[FSDP] == 0
            and config.num_attention_heads % full[TENSOR] == 0
            and job.new_tokens % full[CONTEXT] == 0
            and rows % math.prod(full[axis] for axis in BATCH_AXES) == 0
        )
        if divides:
            yield {axis: full[axis] for axis in AXES if full[axis] > 1} or {FSDP: 1}


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `number` as an ordered product."""
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield (first, *rest)


def _activations(config, job: Job, mesh, tokens: float, params: Sequence[Param]) -> float:
    """Estimate what lives besides arguments: kept layer inputs, one layer's work, its weights."""
    width = config.num_attention_heads * config.head_dim / mesh[TENSOR]
    embed, hidden = config.hidden_size, config.intermediate_size / mesh[TENSOR]
    slots = config.num_experts_per_tok + config.has_shared_expert
    # Layer's input, norms and output; q, k, v, gate, output twice; rows, gate, up, product, output.
    layer = 2 * tokens * (6 * embed + 6 * width + slots * (2 * embed + 3 * hidden))
    gathered = [p.elements / p.layers * p.gathered for p in params if p.gathered > 1]
    of_a_layer = [p.elements / p.layers * p.gathered for p in params if p.layers > 1]
    weights = 2 * sum(of_a_layer) / config.period if gathered else 0
    if not job.training:
        return layer + 2 * weights + 4 * tokens * embed
    kept = {"none": layer, "layer": 2 * tokens * embed, "dots": layer}[config.remat]
    # A layer's weights twice (the next is on its way), their float32 gradient, backward work.
    return config.num_hidden_layers * kept + 2.5 * layer + 4 * weights + 3 * 4 * logprobs.LOGITS


def _collectives(config, job, mesh, rows, tokens, params) -> dict[str, hlo.Traffic]:
    """Return the paper count of one run; see `hlo.collectives` for what a byte received is."""
    layers, micro = config.num_hidden_layers, job.accumulate
    lightning = config.layer_types.count(config_lib.LIGHTNING)
    # A forward pass, the same again with rematerialisation, and a backward pass.
    forward = 1 if not job.training or config.remat == "none" else 2
    passes = forward + job.training
    found: dict[str, list[float]] = {}

    def add(kind: str, count: float, size: float):
        if size and count:
            entry = found.setdefault(kind, [0.0, 0.0])
            entry[0] += micro * count
            entry[1] += micro * count * size

    for p in params:
        each = p.elements / p.layers
        add("all-gather", p.layers * (1 + job.training), 2 * each * (p.gathered - 1))
        if job.training:
            add("reduce-scatter", p.layers, 4 * each * (p.gathered - 1))
            add("all-reduce", p.layers, 8 * each * (1 - 1 / p.summed))
    split = 1 - 1 / mesh[EXPERT]
    exchanged = 2 * tokens * config.num_experts_per_tok * config.hidden_size * split
    add("ragged-all-to-all", 2 * layers * passes, exchanged)
    activations = 2 * 2 * tokens * config.hidden_size * (1 - 1 / mesh[TENSOR])
    add("all-reduce", 2 * layers * passes, activations)
    others = mesh[CONTEXT] - 1
    state = 4 * rows * config.num_attention_heads * config.head_dim**2 / mesh[TENSOR]
    add("all-gather", lightning * passes, state * others)
    keys = 2 * 2 * tokens * config.num_key_value_heads * config.head_dim / mesh[TENSOR]
    # Keys and values each way round the ring, and back with their float32 gradients.
    rounds = (layers - lightning) * others
    add("collective-permute", 2 * rounds * forward, keys / 2)
    if job.training:
        add("collective-permute", 4 * rounds, keys * 3 / 4)
    return {kind: hlo.Traffic(*found[kind]) for kind in hlo.KINDS if kind in found}

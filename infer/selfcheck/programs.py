"""The programs that are timed, and predicted: attention of each form, and a layer of full width.

Each is a function of a carry and of inputs that returns the carry's next value. The carry is
donated, so that calls can be queued without taking more memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m1_jax import attention, forward_context, splash_attention
from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax.plan import time_assumptions
from m1_jax.serving import forward, lightning, ragged_batch, softmax
from m1_jax.serving import state as serving_state
from pallas_kernels.lightning_attention import api, bench

FORWARD, TRAINING = "forward", "forward and backward"
CHUNK_TOKENS, ATTENTION_TILE = 64, 8
EXPERT_BYTES = 3 * 6144 * 9216 * 2  # of one expert of the release in bfloat16
# Of a layer beside its experts and their gradients: projections (0.5 GB) and theirs, activations.
LAYER_BYTES = 5e9


@dataclasses.dataclass(frozen=True)
class ProgramSizes:
    """Sizes of the timed programs: those of one layer of the release, or small ones on CPU.

    Attributes:
      tokens: of the one row that training reads.
      rows: sequences that decode.
      cached_tokens: of each of them.
      layer: config of the layer that is timed as a whole.
    """

    tokens: int
    rows: int
    cached_tokens: int
    layer: config_lib.ModelConfig


def make_sizes(is_small: bool, hbm_bytes: float | None) -> ProgramSizes:
    """Return sizes that fit a device.

    Args:
      hbm_bytes: memory of the device. It decides how many of the 32 experts the layer has. None:
        as with 16 GB.
    """
    full = config_lib.ModelConfig.m1()
    if is_small:
        layer = dataclasses.replace(
            config_lib.ModelConfig.tiny(), layer_types=(config_lib.LIGHTNING,)
        )
        return ProgramSizes(256, 8, 64, layer)
    num_experts = count_fitting_experts(16e9 if hbm_bytes is None else hbm_bytes)
    layer = dataclasses.replace(
        full,
        layer_types=(config_lib.LIGHTNING,),
        num_local_experts=num_experts,
        vocab_size=512,  # embedding and head are left out of training, and small in decoding
    )
    return ProgramSizes(4096, 64, 4096, layer)


def count_fitting_experts(hbm_bytes: float) -> int:
    """Return how many of the release's 32 experts fit, with gradients: a power of two."""
    counts = (32, 16, 8, 4)
    return next((n for n in counts if LAYER_BYTES + 2 * n * EXPERT_BYTES <= hbm_bytes), 2)


@dataclasses.dataclass(frozen=True)
class TimedProgram:
    """One program.

    Attributes:
      name: unique, such as "lightning attention, forward, tpu".
      use: what it stands for, the same for all of its forms.
      form: an implementation, or "default".
      step: (carry, inputs) to the next carry.
      make_arguments: makes (carry, inputs) from a key of random numbers.
      assumptions: what a prediction must know of it.
    """

    name: str
    use: str
    form: str
    step: Callable[[Any, Any], Any]
    make_arguments: Callable[[jax.Array], tuple[Any, Any]]
    assumptions: time_assumptions.TimeAssumptions

    def jit_step(self, **options: Any) -> Any:
        """Return the jitted step. The carry need not be read to be donated."""
        return jax.jit(self.step, donate_argnums=0, keep_unused=True, **options)


def _make_program(use: str, form: str, step, make_arguments, **assumptions: Any) -> TimedProgram:
    known = time_assumptions.TimeAssumptions(**assumptions)
    return TimedProgram(f"{use}, {form}", use, form, step, make_arguments, known)


def _draw(key: jax.Array, index: int, shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, index), shape, dtype)


def _pull_back(function: Callable, inputs: tuple[Any, ...], d_o: Any) -> Any:
    o, pull_back = jax.vjp(function, *inputs)
    # o is returned too: XLA would drop what it alone needs.
    return o, *pull_back(d_o)


# ---- attention over whole rows


def make_lightning_programs(sizes: ProgramSizes, form: str) -> list[TimedProgram]:
    """Return lightning attention of one row, forward, and with its backward pass."""
    config = sizes.layer
    slopes = bench.middle_layer_slopes(config.num_attention_heads)
    width = config.num_attention_heads * config.head_dim

    def attend(qkv):
        return api.lightning_attention(qkv, jnp.asarray(slopes), implementation=form)[0]

    def make_arguments(key, is_training):
        inputs = [_draw(key, n, (1, sizes.tokens, n * width)) for n in (3, 1)]
        o, d_qkv = (jnp.zeros_like(x) for x in reversed(inputs))
        return ((o, d_qkv) if is_training else (o,)), inputs

    def run_forward(_, inputs):
        return (attend(inputs[0]),)

    def run_training(_, inputs):
        return _pull_back(attend, (inputs[0],), inputs[1])

    return [
        _make_program(
            f"lightning attention, {sizes.tokens} tokens, {name}",
            form,
            step,
            functools.partial(make_arguments, is_training=name == TRAINING),
        )
        for name, step in ((FORWARD, run_forward), (TRAINING, run_training))
    ]


def make_softmax_program(sizes: ProgramSizes, form: str) -> TimedProgram:
    """Return causal softmax attention of one row, with its backward pass."""
    config = sizes.layer
    heads = (config.num_attention_heads, *(config.num_key_value_heads,) * 2)

    def attend(q, k, v):
        if form == "splash":
            return splash_attention.attend_rows(q, k, v, None)
        return attention.attend_whole_rows(q, k, v, None, "xla")

    def make_arguments(key):
        q, k, v = (
            _draw(key, i, (1, sizes.tokens, n, config.head_dim)) for i, n in enumerate(heads)
        )
        # o has the shape of q, and the gradients those of q, k and v.
        return tuple(jnp.zeros_like(x) for x in (q, q, k, v)), (q, k, v, _draw(key, 3, q.shape))

    def step(_, inputs):
        *qkv, d_o = inputs
        return _pull_back(attend, tuple(qkv), d_o)

    return _make_program(
        f"softmax attention, {sizes.tokens} tokens, {TRAINING}",
        form,
        step,
        make_arguments,
        branch_shares={"m1_jax.ring_attention": _causal_share(sizes.tokens)},
    )


def _causal_share(tokens: int) -> float:
    num_blocks = max(tokens // 512, 1)  # `ring_attention.TPU_BLOCK_TOKENS`
    return (num_blocks + 1) / (2 * num_blocks)


# ---- the engine's attention


def _make_decode_batch(sizes: ProgramSizes) -> ragged_batch.RaggedBatch:
    """Return a batch of decoding sequences, each with `cached_tokens` before its token."""
    rows = jnp.arange(sizes.rows, dtype=jnp.int32)
    pages_per_row = sizes.cached_tokens // CHUNK_TOKENS + 1
    pages = 1 + rows[:, None] * pages_per_row + jnp.arange(pages_per_row, dtype=jnp.int32)[None]
    # In the middle of a chunk, where a state is read and none is written.
    positions = jnp.full(sizes.rows, sizes.cached_tokens - CHUNK_TOKENS // 2, jnp.int32)
    return ragged_batch.RaggedBatch(
        positions, rows + 1, pages, ATTENTION_TILE, ragged_batch.ACCELERATOR_MATMUL_TILE
    )


def _serving_loops(sizes: ProgramSizes) -> Mapping[str, float]:
    """Return the trips of loops of unknown length, as `time_assumptions` has them."""
    return {
        "m1_jax.serving.ragged_batch.scan_attention_tiles": sizes.rows,
        "m1_jax.serving.ragged_batch.map_row_tiles": 1,
        "m1_jax.serving.ragged_batch": -(-sizes.rows // ragged_batch.TILE_GROUP),
        "m1_jax.serving.softmax": max(sizes.cached_tokens // softmax.BLOCK_KEYS, 1),
    }


def make_serving_lightning_program(sizes: ProgramSizes, form: str) -> TimedProgram:
    """Return one decoding step of lightning attention."""
    config = sizes.layer
    heads, size = config.num_attention_heads, config.head_dim
    slopes = bench.middle_layer_slopes(heads)

    def make_arguments(key):
        lead = (1, 1, sizes.rows + 1, heads)
        memory = serving_state.LightningSlots(
            _draw(key, 0, (*lead, size, size), jnp.float32),
            *(_draw(key, i, (*lead, CHUNK_TOKENS, size)) for i in (1, 2)),
        )
        qkv = _draw(key, 3, (sizes.rows, heads * 3 * size))
        o = jnp.zeros((sizes.rows, heads * size), qkv.dtype)
        return (o, memory), (qkv, _make_decode_batch(sizes))

    def step(carry, inputs):
        qkv, batch = inputs
        implementation = "tpu" if form == "tpu" else "chunked"
        return lightning.attend_slots(
            qkv, jnp.asarray(slopes), batch, carry[1], (0, 0), implementation
        )

    return _make_program(
        f"serving lightning attention, {sizes.rows} rows",
        form,
        step,
        make_arguments,
        loop_trips=_serving_loops(sizes),
        num_running_rows=sizes.rows,
        num_cached_tokens=sizes.cached_tokens,
    )


def make_serving_softmax_program(sizes: ProgramSizes, form: str) -> TimedProgram:
    """Return one decoding step of softmax attention over pages."""
    config = sizes.layer
    heads = (config.num_attention_heads, *(config.num_key_value_heads,) * 2)

    def make_arguments(key):
        batch = _make_decode_batch(sizes)
        num_pages = batch.pages.size + 1
        shape = (1, 1, num_pages, config.num_key_value_heads, CHUNK_TOKENS, config.head_dim)
        cache = serving_state.PagedKVCache(*(_draw(key, i, shape) for i in (3, 4)))
        q, k, v = (_draw(key, i, (sizes.rows, n, config.head_dim)) for i, n in enumerate(heads))
        return (jnp.zeros_like(q), cache), (q, k, v, batch)

    def step(carry, inputs):
        q, k, v, batch = inputs
        return softmax.attend_pages(q, k, v, batch, carry[1], (0, 0), form)

    return _make_program(
        f"serving softmax attention, {sizes.rows} rows of {sizes.cached_tokens} tokens",
        form,
        step,
        make_arguments,
        loop_trips=_serving_loops(sizes),
        num_running_rows=sizes.rows,
        num_cached_tokens=sizes.cached_tokens,
    )


# ---- a whole layer


def _make_layer_model(config: config_lib.ModelConfig, key: jax.Array) -> model_lib.MiniMaxM1:
    dtype = jnp.bfloat16
    return model_lib.MiniMaxM1(config, nnx.Rngs(key), dtype=dtype, param_dtype=dtype)


def describe_layer(config: config_lib.ModelConfig) -> str:
    """Return how a report calls the layer."""
    return (
        f"one lightning layer of width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.num_local_experts} experts of {config.intermediate_size}"
    )


def make_training_layer_program(sizes: ProgramSizes) -> TimedProgram:
    """Return one layer's forward and backward pass, with gradients of all its parameters."""
    config = sizes.layer
    context = forward_context.ForwardContext(
        jnp.arange(sizes.tokens, dtype=jnp.int32).reshape(1, -1), length_sharded=True
    )

    def make_arguments(key):
        layers = _make_layer_model(config, key)
        x, d_x = (_draw(key, i, (1, sizes.tokens, config.hidden_size)) for i in range(2))
        gradients = jax.tree.map(jnp.zeros_like, (layers, x))
        return gradients, (layers, x, d_x)

    def step(_, inputs):
        layers, x, d_x = inputs

        def compute_loss(layers, x):
            y = layers.run_layers(x, context).x
            return jnp.sum(y.astype(jnp.float32) * d_x.astype(jnp.float32))

        return jax.grad(compute_loss, (0, 1))(layers, x)

    return _make_program(
        f"{describe_layer(config)}: training, {sizes.tokens} tokens",
        "default",
        step,
        make_arguments,
        num_expert_rows=float(sizes.tokens * config.num_experts_per_tok),
        num_busy_experts=float(config.num_local_experts),
    )


def make_decoding_layer_program(sizes: ProgramSizes) -> TimedProgram:
    """Return one layer's decoding step in the engine's form, with a small head."""
    config = sizes.layer

    def make_arguments(key):
        layers = _make_layer_model(config, key)
        state = serving_state.init_serving_state(config, sizes.rows, 0, CHUNK_TOKENS)
        tokens = jnp.arange(sizes.rows, dtype=jnp.int32) % config.vocab_size
        logits = jnp.zeros((sizes.rows, config.vocab_size), jnp.float32)
        return (logits, state), (layers, tokens, _make_decode_batch(sizes))

    def step(carry, inputs):
        layers, tokens, batch = inputs
        return forward.forward_ragged(layers, tokens, batch, carry[1])

    rows = sizes.rows * config.num_experts_per_tok
    share_of_busy = 1 - (1 - 1 / config.num_local_experts) ** rows
    return _make_program(
        f"{describe_layer(config)}: decoding, {sizes.rows} rows",
        "default",
        step,
        make_arguments,
        loop_trips=_serving_loops(sizes),
        num_expert_rows=float(rows),
        num_busy_experts=config.num_local_experts * share_of_busy,
        num_running_rows=sizes.rows,
        num_cached_tokens=sizes.cached_tokens,
    )


def list_programs(sizes: ProgramSizes, platform: str) -> list[TimedProgram]:
    """Return the programs for a platform, the heaviest last.

    Forms of one use are neighbours.
    """
    kernels = {"tpu": ["tpu"], "gpu": ["gpu"]}.get(platform, [])
    is_tpu = platform == "tpu"
    by_form = [make_lightning_programs(sizes, form) for form in (*kernels, "chunked")]
    programs = [program for forms in zip(*by_form, strict=True) for program in forms]
    serving_forms = ["tpu", "xla"] if is_tpu else ["xla"]
    programs += [make_serving_lightning_program(sizes, form) for form in serving_forms]
    programs += [make_serving_softmax_program(sizes, form) for form in serving_forms]
    row_forms = ["splash", "xla"] if is_tpu else ["xla"]
    programs += [make_softmax_program(sizes, form) for form in row_forms]
    return [*programs, make_decoding_layer_program(sizes), make_training_layer_program(sizes)]

"""No Python number beyond int32 enters traced code, at the true sizes of the shipped configs.

JAX takes a Python int for an int32, and fails at the first step of a run whose tokens, rows or
bytes are more than that. So every program is traced here from shapes, with the settings of the
configs, and every `jax.jit` of the packages must be named here.
"""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from infer.execution import drafts as drafts_lib
from infer.execution import programs
from m1_jax import config as config_lib
from m1_jax import configlib, sharding
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import state as state_lib
from train import checkpoints, evaluate, lora, optim, run_model, run_setup
from train import step as step_lib
from train.data import batch as batch_lib
from train.rl import batch as rl_batch
from train.rl import config as rl_config
from train.rl import loop as rl_loop
from train.rl import rollout_setup, row_packing, weight_sync
from train.rl import step as rl_step

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ("train", "infer", "m1_jax", "pallas_kernels")
_KERNEL = "a kernel's shapes and block sizes; pallas tests run it"
_NO_NUMBERS = "no number of the host is in it"
_CHECK = "m1-selfcheck runs it, at sizes of its own"
_PLAN = "m1-plan traces it at full size, for any slice"

# Every function that calls `jax.jit` or is decorated with it: the test here that traces it at true
# size, or why none needs to. A number of the host is one of a config or of a run's state.
JITTED = {
    "train/step.py:train_step": "test_train_steps",
    "train/evaluate.py:sum_losses": "test_evaluation",
    "train/rl/step.py:score_logprobs": "test_rl_updates",
    "train/rl/step.py:accumulate_gradients": "test_rl_updates",
    "train/rl/step.py:apply_update": "test_rl_updates",
    "train/rl/weight_sync.py:WeightSync._prepare": "test_weight_sync_and_digest",
    "train/checkpoints.py:digest_state": "test_weight_sync_and_digest",
    "train/rehearsal/schedules.py:evaluate_schedule": "it looks for such numbers itself",
    "train/lora.py:add_adapters": "test_adapters",
    "train/lora.py:merge_adapters": "test_adapters",
    "train/lora.py:_change_products": "test_adapters",
    "m1_jax/model.py:_compute_logits": "test_forward_passes",
    "m1_jax/model.py:_extend_sequences": "test_forward_passes",
    "m1_jax/golden_comparison.py:_compare_forward": "test_forward_passes",
    "m1_jax/golden_comparison.py:_compare_gradients": "test_forward_passes",
    "infer/execution/device.py:Device.__init__": "test_engine_programs",
    "infer/execution/compiled_program.py:CompiledProgram.__init__": "test_engine_programs",
    "m1_jax/params.py:random_model": "test_first_weights",
    "m1_jax/state.py:init_decode_state": "test_forward_passes",
    "m1_jax/serving/state.py:init_serving_state": "test_engine_programs",
    "infer/suspend.py:digest_arrays": _NO_NUMBERS,
    "infer/selfcheck/lightning_checks.py:_compare": _CHECK,
    "infer/selfcheck/serving_checks.py:SlotServer.__init__": _CHECK,
    "infer/selfcheck/softmax_checks.py:_compare_rows": _CHECK,
    "infer/selfcheck/softmax_checks.py:PageServer.__init__": _CHECK,
    "infer/selfcheck/expert_checks.py:check_gradients": _CHECK,
    "infer/selfcheck/expert_checks.py:check_stack": _CHECK,
    "infer/selfcheck/programs.py:TimedProgram.jit_step": _CHECK,
    "infer/selfcheck/timing.py:time_program": _CHECK,
    "m1_jax/multihost.py:_block_program": _NO_NUMBERS,
    "m1_jax/oracle.py:_compiled_forward": "float64 on small models",
    "m1_jax/plan/jobs.py:trace_extend": _PLAN,
    "m1_jax/plan/jobs.py:trace_serve": _PLAN,
    "m1_jax/plan/aot.py:probe_hbm_limit_bytes": _NO_NUMBERS,
    "pallas_kernels/lightning_attention/bench.py:bench_decode": _KERNEL,
    "pallas_kernels/lightning_attention/bench.py:bench_training": _KERNEL,
    "pallas_kernels/lightning_attention/bench.py:measure_copy_bandwidth": _KERNEL,
    "pallas_kernels/lightning_attention/gpu_bwd.py:lightning_backward": _KERNEL,
    "pallas_kernels/lightning_attention/gpu_fwd.py:lightning_forward": _KERNEL,
    "pallas_kernels/lightning_attention/schedule.py:trace_serving": _KERNEL,
    "pallas_kernels/paged_attention/tpu.py:attend_pages": _KERNEL,
    "m1_jax/compiler_options.py:_ask_compiler": _NO_NUMBERS,
    "m1_jax/compiler_options.py:DeviceJit.__init__": "its callers are named here",
    "pallas_kernels/lightning_attention/tpu_bwd.py:lightning_backward": _KERNEL,
    "pallas_kernels/lightning_attention/tpu_fwd.py:lightning_forward": _KERNEL,
}


def _jitted_places():
    """Yield "file:function" of every use of `jax.jit`, or of our own form of it."""
    for package in _PACKAGES:
        for path in sorted((_REPO / package).rglob("*.py")):
            file = str(path.relative_to(_REPO))
            tree = ast.parse(path.read_text())
            for name in _find_jits(tree, ()):
                yield f"{file}:{'.'.join(name)}"


def _find_jits(node, scope):
    for child in ast.iter_child_nodes(node):
        inner = scope
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            # A function within another is found by the outer one's name.
            is_within_function = bool(scope) and not scope[-1][0].isupper()
            inner = scope if is_within_function else (*scope, child.name)
        if isinstance(child, ast.Attribute) and ast.unparse(child) in (
            "jax.jit",
            "compiler_options.jit_for_device",
            "nnx.jit",
            "jax.pmap",
            "eqx.filter_jit",
        ):
            yield inner or ("module",)
        yield from _find_jits(child, inner)


def test_every_jitted_function_is_traced_here_or_says_why_not():
    assert set(_jitted_places()) == JITTED.keys()
    tests = {value for value in JITTED.values() if value.startswith("test_")}
    assert not tests - globals().keys()


def test_a_jit_that_is_not_listed_is_found():
    code = "import jax\nclass A:\n  def b(self):\n    def c(): pass\n    return jax.jit(c)\n"
    code += (
        "@jax.jit\ndef d(x): pass\n@functools.partial(jax.jit, static_argnums=0)\ndef e(x): pass"
    )
    assert list(_find_jits(ast.parse(code), ())) == [("A", "b"), ("d",), ("e",)]


# ---- traces at true size


def load_config(name):
    return configlib.load_config(f"configs/{name}.py")


def make_run_model(config):
    return run_model.RunModel(
        config_lib.ModelConfig.m1(), None, "", jnp.dtype(config.dtype), None, 0
    )


def abstract_batch(rows, length):
    ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    return batch_lib.TrainBatch(ints, ints, ints, ints, weights)


def test_a_number_beyond_int32_is_an_error_of_tracing():
    """Without this the other tests would hold nothing."""
    with pytest.raises(OverflowError):
        jax.jit(lambda x: x * 2**31).trace(jax.ShapeDtypeStruct((), jnp.int32))


LAST_STAGES = [("pretrain_m1_4k", 1), ("pretrain_m1_1m", 3), ("sft_m1", 0)]
OTHER_STAGES = [("pretrain_m1_4k", 0), *(("pretrain_m1_1m", stage) for stage in range(3))]


@pytest.mark.parametrize(
    ("name", "stage"),
    [*LAST_STAGES, *(pytest.param(*pair, marks=pytest.mark.long) for pair in OTHER_STAGES)],
)
def test_train_steps(name, stage):
    config = load_config(name)
    model = make_run_model(config)
    setup = run_setup.TrainSetup(config, model, (None,) * len(config.stages))
    settings = setup.step_settings(stage)
    state = model.abstract_state(None, settings.optimizer)
    sizes = config.stages[stage]
    step_lib.train_step.trace(state, abstract_batch(sizes.rows, sizes.seq_len), settings=settings)


def test_balance_points_beyond_int32():
    points = ((0, 0.01), (5 * 10**12, 0.001))
    schedule = optim.make_piecewise_schedule(points, 5 * 10**12 // 2, 2**21, 1_192_093)
    jax.jit(schedule).trace(jax.ShapeDtypeStruct((), jnp.int32))


def test_evaluation():
    config = load_config("pretrain_m1_1m")
    sizes = config.stages[-1]
    model = make_run_model(config).abstract_model(None)
    rows = jax.ShapeDtypeStruct((sizes.rows, sizes.seq_len), jnp.int32)
    evaluate.sum_losses.trace(model, abstract_batch(sizes.rows, sizes.seq_len), rows, 1)


def test_rl_updates():
    config = load_config("cispo_m1")
    model = make_run_model(config)
    optimizer = rl_loop.make_optimizer(config)
    settings = rl_step.RlStepSettings(
        optimizer, config.objective, config.rollout.temperature, config.update.balance
    )
    state = model.abstract_state(None, optimizer)
    shape = row_packing.make_row_shapes(
        config.update.rows, config.rollout.max_sample_tokens, None
    ).largest
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32)
    ids = jax.ShapeDtypeStruct((*shape, model.config.num_hidden_layers, 2), jnp.int8)
    rows = rl_batch.PackedRows(*(ints,) * 4, *(floats,) * 6, ids)
    share = jax.ShapeDtypeStruct((), jnp.float32)
    rl_step.score_logprobs.trace(state.model, rows, settings.temperature)
    first = rl_step.accumulate_gradients.trace(None, state.model, rows, share, None, settings)
    sums = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first.out_info)
    rl_step.accumulate_gradients.trace(sums, state.model, rows, share, None, settings)
    rl_step.apply_update.trace(state, sums.gradients, settings)


def test_weight_sync_and_digest():
    config = load_config("cispo_m1")
    model = make_run_model(config)
    sync = weight_sync.WeightSync(model.config, jnp.bfloat16)
    state = model.abstract_state(None, rl_loop.make_optimizer(config))
    sync.trace(state.model)
    checkpoints.digest_state.trace(state)


def test_forward_passes():
    model = make_run_model(load_config("cispo_m1")).abstract_model(None)
    tokens = jax.ShapeDtypeStruct((2, 2**20), jnp.int32)
    model_lib._compute_logits.trace(model, tokens, tokens, tokens)
    state = jax.eval_shape(lambda: state_lib.init_decode_state(model.config, 2, 2**20))
    counts = jax.ShapeDtypeStruct((2,), jnp.int32)
    for length in (1, 2**19):
        tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
        model_lib._extend_sequences.trace(model, tokens, state, counts, last_only=True)
    # `m1-verify` runs this, and its gradients.
    jax.eval_shape(model_lib.MiniMaxM1.trace, model, jax.ShapeDtypeStruct((1, 4096), jnp.int32))


def test_engine_programs():
    config = load_config("cispo_m1")
    assert isinstance(config, rl_config.RlConfig)
    engine = rollout_setup.make_run_engine_config(config, {})
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    model_config = config_lib.ModelConfig.m1()
    layout = sharding.make_layout(mesh, model_config, sharding.DECODE)
    model = params_lib.abstract_model(model_config, jnp.bfloat16, jnp.bfloat16, layout)
    tiles = programs.EngineTiles.of_config(engine.for_platform("cpu"))
    state, (sampling, batch, steps) = programs.abstract_decode_inputs(model_config, layout, engine)
    decode = functools.partial(programs.decode_tokens, tiles=tiles, max_steps=engine.decode_steps)
    jax.jit(decode).trace(model, state, sampling, batch, steps)
    size, tokens = engine.decode_batch_sizes[-1], engine.prefill_tokens[-1]
    by_token, by_row = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (tokens, size))
    by_tile = jax.ShapeDtypeStruct((tokens // engine.attention_tile,), jnp.int32)
    prompts = programs.PackedPrompts(by_token, by_token, by_tile, by_row, by_row, by_row)
    prefill = functools.partial(programs.prefill_prompts, tiles=tiles)
    jax.jit(prefill).trace(model, state, sampling, batch, prompts)
    drafts = jax.ShapeDtypeStruct((size, engine.attention_tile), jnp.int32)
    verify = functools.partial(drafts_lib.verify_drafts, tiles=tiles)
    jax.jit(verify).trace(model, state, sampling, batch, drafts)


def test_first_weights():
    config = config_lib.ModelConfig.m1()
    jax.eval_shape(lambda key: params_lib.random_model(config, key), jax.random.key(0))


def test_adapters():
    model = make_run_model(load_config("sft_m1")).abstract_model(None)
    adapted = jax.eval_shape(
        lambda key: lora.add_adapters(model, lora.LoraConfig(rank=64), key), jax.random.key(0)
    )
    # `merge_adapters` takes arrays that lie somewhere. This is its program.
    rank_64 = [
        jax.ShapeDtypeStruct((80, *shape), jnp.float32) for shape in ((6144, 64), (64, 8192))
    ]
    kernel = jax.ShapeDtypeStruct((80, 6144, 8192), jnp.bfloat16)
    merge = functools.partial(lora._merge_kernel, dtype=kernel.dtype)
    jax.eval_shape(merge, kernel, *rank_64, 2.0)
    jax.eval_shape(lora._change_products, [(*rank_64, *rank_64)], [(2.0, 2.0)])
    assert jax.tree.leaves(adapted)

"""m1-selfcheck finds a fault in each kernel, and names the check: one fault at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from infer.execution import transfers
from infer.selfcheck import check, command, model_checks, runner
from m1_jax import experts, golden_file, quantize, splash_attention
from pallas_kernels.lightning_attention import (
    boundaries,
    chunked,
    gpu_bwd,
    gpu_fwd,
    tpu_bwd,
    tpu_fwd,
)
from pallas_kernels.lightning_serving import tpu as tpu_serving
from pallas_kernels.paged_attention import tpu as tpu_paged

SETTING = check.DeviceSetting("cpu", "cpu", is_small=True)
TPU, GPU = "lightning attention (TPU kernels), ", "lightning attention (GPU kernels), "


@pytest.fixture(autouse=True)
def fresh_traces():
    """Kernels are jitted: a trace with a fault must not outlive its test, nor one without it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def make_check(name):
    """Return one of the command's checks, those of times left out."""
    (found,) = [c for c in command.list_kernel_checks() if c.name == name]
    return found


def run_check(name):
    checks = [make_check(name)]
    run = runner.CheckRun(checks, SETTING, 600, lambda _: None, lambda *_: None)
    run.run(lambda: None)
    (result,) = run.results
    return result


def wrap(monkeypatch, module, name, change_arguments=None, change_outputs=None):
    """Change the arguments or the outputs of a function by a function of both."""
    original = getattr(module, name)

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        if change_arguments:
            args, kwargs = change_arguments(list(args), dict(kwargs))
        outputs = original(*args, **kwargs)
        return change_outputs(args, outputs) if change_outputs else outputs

    monkeypatch.setattr(module, name, faulty)


def change_argument(index, change):
    def change_arguments(args, kwargs):
        args[index] = change(args[index])
        return args, kwargs

    return change_arguments


def faster_decay(module, name):
    """The second argument of every kernel is the slopes."""
    return lambda patch: wrap(patch, module, name, change_argument(1, lambda s: s * 1.02))


def drop_tail(module, name):
    """The last tokens of a row, in a chunk that they do not fill, are never written."""

    def clear_tail(_, outputs):
        leaves, structure = jax.tree.flatten(outputs)
        leaves[0] = leaves[0].at[:, -22:].set(0)  # o comes first
        return jax.tree.unflatten(structure, leaves)

    return lambda patch: wrap(patch, module, name, change_outputs=clear_tail)


def ignore_documents(patch):
    def join(segment_ids):
        return jnp.where(segment_ids > 0, 1, 0)

    wrap(patch, boundaries, "build_boundary_tables", change_argument(0, join))


def keep_stale_state(patch):
    """The state of a chunk's start is never moved on."""

    def put_back(args, outputs):
        o, memory = outputs
        return o, memory._replace(states=args[4].states)

    wrap(patch, tpu_serving, "attend_tiles", change_outputs=put_back)


def write_another_slot(patch):
    def write(_, outputs):
        o, memory = outputs
        return o, memory._replace(keys=memory.keys.at[0, 0, 2].set(0))

    wrap(patch, tpu_serving, "attend_tiles", change_outputs=write)


def see_the_next_key(patch):
    wrap(patch, tpu_paged, "attend_pages", change_argument(1, lambda first: first + 1))


def drop_the_last_key(patch):
    wrap(patch, tpu_paged, "attend_pages", change_argument(2, lambda last: last - 1))


def attend_to_the_future(patch):
    """A causal mask off by one block's row."""

    def make(masks):
        return original([splash.CausalMask(mask.shape, offset=1) for mask in masks])

    original = splash.MultiHeadMask
    patch.setattr(splash, "MultiHeadMask", make)


def join_documents_of_splash(patch):
    def forget_ids(args, kwargs):
        return args[:5], kwargs | {"segment_ids": None}

    wrap(patch, splash_attention, "_run_kernels", forget_ids)


def forget_weights(patch):
    wrap(patch, experts, "_weighted_hidden", change_argument(2, jnp.ones_like))


def forget_a_gradient(patch):
    def clear_up(_, outputs):
        d_rows, d_gate, d_up, d_down, d_weights = outputs
        return d_rows, d_gate, jnp.zeros_like(d_up), d_down, d_weights

    wrap(patch, experts, "_expert_tile_gradients", change_outputs=clear_up)


def forget_scales(patch):
    wrap(patch, quantize, "scaled_matmul", change_argument(2, jnp.ones_like))


def read_another_layer(patch):
    def first_layer(args, kwargs):
        return args, kwargs | {"stack_index": (0, 0)}

    original = experts._run_expert_tiles

    def faulty(*args, **kwargs):
        if kwargs.get("stack_index"):
            args, kwargs = first_layer(args, kwargs)
        return original(*args, **kwargs)

    patch.setattr(experts, "_run_expert_tiles", faulty)


def raise_in_the_kernel(patch):
    def refuse(*_, **__):
        raise NotImplementedError("this compiler has no such product")

    patch.setattr(tpu_paged, "attend_pages", refuse)


@dataclasses.dataclass(frozen=True)
class PlantedFault:
    """A fault, the check that must find it, and what the reason must name."""

    plant: object
    check_name: str
    reason: str


# The first fault of each kernel runs with every landing.
FAULTS = {
    "TPU forward, decay": PlantedFault(
        faster_decay(tpu_fwd, "lightning_forward"), f"{TPU}float32", "o, plain"
    ),
    "GPU forward, decay": PlantedFault(
        faster_decay(gpu_fwd, "lightning_forward"), f"{GPU}float32", "o, plain"
    ),
    "serving lightning, stale state": PlantedFault(
        keep_stale_state, "serving lightning attention (TPU kernel), float32", "state, first"
    ),
    "paged, mask": PlantedFault(
        see_the_next_key, "serving softmax attention (TPU kernel), float32", "o, long sequence"
    ),
    "splash, mask": PlantedFault(attend_to_the_future, "splash attention, float32", "o, plain"),
    "experts, weights": PlantedFault(forget_weights, "experts, training, float32", "y: error"),
    "experts, int8 scales": PlantedFault(forget_scales, "experts, serving, int8", "y, stack"),
    "serving lightning, another slot": PlantedFault(
        write_another_slot, "serving lightning attention (TPU kernel), float32", "keys: memory"
    ),
    "paged, a compiler's error": PlantedFault(
        raise_in_the_kernel,
        "serving softmax attention (TPU kernel), float32",
        "NotImplementedError: this compiler has no such product",
    ),
    "experts, another layer": PlantedFault(
        read_another_layer, "experts, serving, bfloat16", "y, stack"
    ),
    "experts, gradient of up": PlantedFault(
        forget_a_gradient, "experts, training, bfloat16", "d_up"
    ),
    "TPU backward, decay": PlantedFault(
        faster_decay(tpu_bwd, "lightning_backward"), f"{TPU}bfloat16", "d_qkv, plain"
    ),
    "TPU, tail": PlantedFault(
        drop_tail(tpu_fwd, "lightning_forward"), f"{TPU}bfloat16", "o, plain"
    ),
    "TPU, documents": PlantedFault(ignore_documents, f"{TPU}float32", "o, packed"),
    "GPU backward, decay": PlantedFault(
        faster_decay(gpu_bwd, "lightning_backward"), f"{GPU}bfloat16", "d_qkv, plain"
    ),
    "GPU, tail": PlantedFault(drop_tail(gpu_fwd, "lightning_forward"), f"{GPU}float32", "o, plain"),
    "GPU, documents": PlantedFault(ignore_documents, f"{GPU}bfloat16", "o, packed"),
    "XLA, decay": PlantedFault(
        faster_decay(chunked, "lightning_attention"),
        "lightning attention (XLA), float32",
        "o, plain",
    ),
    "serving lightning, decay": PlantedFault(
        faster_decay(tpu_serving, "attend_tiles"),
        "serving lightning attention (TPU kernel), bfloat16",
        "state, first",
    ),
    "paged, last key": PlantedFault(
        drop_the_last_key, "serving softmax attention (TPU kernel), bfloat16", "o, short sequence"
    ),
    "splash, documents": PlantedFault(
        join_documents_of_splash, "splash attention, bfloat16", "o, packed"
    ),
}
_NUM_SHORT = 7


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if i < _NUM_SHORT else pytest.mark.long)
        for i, name in enumerate(FAULTS)
    ],
)
def test_a_fault_is_found_and_named(name, monkeypatch):
    fault = FAULTS[name]
    fault.plant(monkeypatch)
    result = run_check(fault.check_name)
    assert result.status == check.FAILED
    assert fault.reason in result.reason


@pytest.mark.long
@pytest.mark.parametrize("name", sorted({fault.check_name for fault in FAULTS.values()}))
def test_without_a_fault_the_same_checks_pass(name):
    result = run_check(name)
    assert (result.status, result.reason) == (check.PASSED, "")


@pytest.mark.long
def test_an_engine_that_remembers_another_request_is_found(monkeypatch):
    """A slot keeps the counts and the bias of the request that had it before."""

    def keep(layout, sampling_state, slot, ids, values):
        return sampling_state

    monkeypatch.setattr(transfers, "reset_slot", keep)
    result = run_engine_check()
    assert result.status == check.FAILED
    assert "FuzzCase" in result.reason


@pytest.mark.long
def test_the_engine_itself_passes():
    result = run_engine_check()
    assert (result.status, result.reason) == (check.PASSED, "")
    assert result.findings.details["requests_compared"] > 5


def run_engine_check():
    (engine_check,) = [c for c in model_checks.list_checks() if c.part == "engine"]
    run = runner.CheckRun([engine_check], SETTING, 3000, lambda _: None, lambda *_: None)
    run.run(lambda: None)
    return run.results[0]


def test_a_golden_number_that_differs_is_named(monkeypatch):
    read_arrays = golden_file.read_golden_arrays

    def change_one(path):
        arrays = read_arrays(path)
        kept = ("input_ids", "aux_loss")  # one pass instead of all comparisons
        return {key: arrays[key] * (1 if key == "input_ids" else 1.01) for key in kept}

    monkeypatch.setattr(golden_file, "read_golden_arrays", change_one)
    findings = model_checks.check_golden(SETTING)
    assert check.describe_failure(findings).startswith("aux_loss: error 2")

"""The common part of comparisons with transformers: two equal models, a quiet machine, fair clocks.

Both sides run in one process. It starts itself again with a malloc that keeps freed memory
(`kept_memory.py`). A call is repeated if other processes, or the hypervisor, took CPU time during
it. torch's threads spin at barriers, so a busy neighbour slows torch tenfold where it slows JAX a
little.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import kept_memory
import torch
import transformers

import m1_jax

_ALPHA = 3.5565588200778455  # The release's; transformers would default to 1.
_MODEL = {
    "num_hidden_layers": 8,
    "layer_types": ["linear_attention"] * 7 + ["full_attention"],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    # transformers rotates the whole head whatever rotary_dim says, so this model must too.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    **{f"{kind}_alpha_factor": _ALPHA for kind in ("linear_attn", "full_attn", "mlp")},
    "bos_token_id": None,
    "eos_token_id": None,
}
_FULL = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 1024, "vocab_size": 8192}
_TINY = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 512}
MODELS = {"full": _MODEL | _FULL, "tiny": _MODEL | _TINY}  # 120M parameters, or a quick try


def start() -> None:
    """Start the process again with the right malloc, if need be, and set both sides up."""
    kept_memory.start_again()
    jax.config.update("jax_platforms", "cpu")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)


def build(model: Mapping[str, Any]):
    """Return (our model, their model) with equal random weights, through a saved checkpoint."""
    torch.manual_seed(0)
    # transformers' default of 0.02 would let the embedding alone decide the logits. With this every
    # layer matters.
    std = model["hidden_size"] ** -0.5
    config = transformers.MiniMaxConfig(**model, initializer_range=std, dtype="float32")
    hf_model = transformers.MiniMaxForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        hf_model.save_pretrained(directory)
        return m1_jax.load(directory, dtype=jnp.float32), hf_model


def machine(hf_model) -> dict[str, Any]:
    """Return the machine and versions that a published number is reported with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in hf_model.parameters()),
    }


def clock(call: Callable[[], Any]) -> float:
    """Return the seconds of `call`, whose JAX result is waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(
    sides: Mapping[str, Callable[[], Any]], repeats: int, patience_secs: float
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Call all sides in turn until each has `repeats` undisturbed calls. The first call is dropped.

    Args:
      sides: the calls, by name.
      patience_secs: time that may be spent waiting for a quiet machine.

    Returns:
      The results of each side's undisturbed calls, or of all its calls where none was undisturbed,
      and the number of undisturbed calls.
    """
    for side in sides.values():
        side()
    quiet: dict[str, list[Any]] = {name: [] for name in sides}
    disturbed: dict[str, list[Any]] = {name: [] for name in sides}
    deadline = time.monotonic() + patience_secs
    for _ in range(2 * repeats):
        for name, side in sides.items():
            if len(quiet[name]) < repeats:
                _wait_for_peace(deadline)
                result, in_peace = _undisturbed(side)
                (quiet if in_peace else disturbed)[name].append(result)
    num_quiet = {name: len(values) for name, values in quiet.items()}
    return {name: quiet[name] or disturbed[name] for name in sides}, num_quiet


def _busy_secs() -> float:
    """Return the CPU seconds of all processes and the hypervisor so far, 0 if unknown."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _undisturbed(call: Callable[[], Any]) -> tuple[Any, bool]:
    """Return (the result of `call`, whether no other process took CPU time during it)."""
    start, busy, own = time.perf_counter(), _busy_secs(), time.process_time()
    result = call()
    others_secs = _busy_secs() - busy - (time.process_time() - own)
    # /proc/stat counts in hundredths of a second per core, and the kernel has chores of its own.
    return result, others_secs < 0.04 + 0.05 * (time.perf_counter() - start)


def _wait_for_peace(deadline: float) -> None:
    """Sleep until no other process computes: most calls on a busy machine would be in vain."""
    while time.monotonic() < deadline and not _undisturbed(lambda: time.sleep(0.3))[1]:
        pass


def _cpu_name() -> str:
    if not os.path.exists("/proc/cpuinfo"):
        return platform.machine()
    with open("/proc/cpuinfo") as file:
        return next((s.split(":")[1].strip() for s in file if s.startswith("model name")), "?")

"""Which forms of serving attention an engine runs."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from m1_jax import config as config_lib
from m1_jax.serving import implementations

M1 = config_lib.ModelConfig.tiny()
M1 = dataclasses.replace(M1, head_dim=128, num_attention_heads=8, num_key_value_heads=1)


@pytest.mark.parametrize(
    ("kind", "changes", "tile", "want"),
    [
        ("TPU v5", {}, 8, {"lightning": "tpu", "softmax": "tpu"}),
        (
            "TPU v6 lite",
            {"lightning_implementation": "tpu"},
            8,
            {"lightning": "tpu", "softmax": "tpu"},
        ),
        (
            "TPU v5",
            {"lightning_implementation": "chunked"},
            8,
            {"lightning": "xla", "softmax": "tpu"},
        ),
        ("TPU v5", {"head_dim": 64}, 8, implementations.XLA_ONLY),
        ("TPU v5", {}, 4, {"lightning": "xla", "softmax": "tpu"}),
        ("TPU v4", {}, 8, {"lightning": "xla", "softmax": "tpu"}),
        ("cpu", {}, 8, implementations.XLA_ONLY),
    ],
)
def test_kernels_run_where_they_fit(monkeypatch, kind, changes, tile, want):
    platform = "tpu" if kind.startswith("TPU") else kind
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    config = dataclasses.replace(M1, **changes)
    got = implementations.resolve_implementations(config, jnp.bfloat16, None, tile, 64)
    assert got == want

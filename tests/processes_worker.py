"""One of several processes that compute one loss and save one model.

processes_worker.py PORT PROCESSES INDEX DIRECTORY
"""

import dataclasses
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from m1_jax import ModelConfig, load, logprobs, moe, sharding
from m1_jax import params as params_lib
from m1_jax.checkpoints import save as save_lib
from m1_jax.config import LIGHTNING, SOFTMAX


def main(port: str, processes: int, index: int, directory: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    config = dataclasses.replace(
        ModelConfig.tiny(), layer_types=(LIGHTNING, SOFTMAX), vocab_size=128, initializer_range=0.2
    )
    layout = sharding.make_layout(
        sharding.make_mesh({"fsdp": 2, "expert": 2, "context": 2}), config
    )
    model = params_lib.random_model(config, jax.random.key(0), jnp.float32, layout=layout)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, (4, 32)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]] * 4, [20, 7, 5], axis=1).astype(np.int32)

    def place(array):
        where = layout.activation_sharding("batch", "length")
        return jax.make_array_from_callback(array.shape, where, lambda part: array[part])

    @jax.jit
    @jax.value_and_grad
    def loss(model, tokens, segments):
        hidden, stats = model.hidden(tokens, segments)
        logp = logprobs.token_logprobs(model, hidden, tokens).logp
        return -jnp.mean(logp * (segments > 0)) + 0.5 * moe.balance_loss(stats)

    value, gradients = loss(model, place(tokens), place(segments))
    norms = jax.jit(lambda tree: jax.tree.map(jnp.linalg.norm, tree))
    norms = norms({k: v[...] for k, v in params_lib.params_by_path(gradients).items()})
    logits = model(place(tokens), place(segments))
    sums = jax.jit(lambda x: jnp.sum(jnp.abs(x), axis=(0, 1)))(logits)
    error = ""
    try:
        model(place(np.full_like(tokens, 999)))
    except ValueError as refused:
        error = str(refused)
    saved = load(save_lib.save(model, directory), mesh=layout.mesh)
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(saved), strict=True)
    said = {
        "restored": all(
            np.array_equal(a.data, b.data)
            for one, other in pairs
            for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True)
        ),
        "devices": jax.device_count(),
        "local_devices": jax.local_device_count(),
        "loss": float(value),
        "gradients": {name: float(norm) for name, norm in norms.items()},
        "logits": np.asarray(sums).tolist(),
        "error": error,
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

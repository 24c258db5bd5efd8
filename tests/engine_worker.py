"""One of several processes of 4 devices together that serve the tiny model: PORT PROCESSES INDEX.

Process 0 prints what the engine made, as JSON.
"""

import json
import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import m1_jax
from infer import config as config_lib
from infer import engine, options
from infer.execution import leader_follower
from m1_jax import sharding, testing, tokenizer
from m1_jax.config import ModelConfig

CONFIG = config_lib.EngineConfig(
    max_length=64,
    max_rows=4,
    chunk_tokens=16,
    prefill_tokens=(32,),
    num_snapshots=4,
    decode_steps=4,
    swap_tokens=1,
    host_bytes=10**9,
    record_routes=True,
)


def main(port: str, processes: int, index: int) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    mesh = sharding.make_mesh({"expert": 2, "tensor": 2})
    path = "tests/data/m1-tiny"
    layout = sharding.make_layout(
        mesh, ModelConfig.from_file(f"{path}/config.json"), sharding.DECODE
    )
    model = m1_jax.load(path, dtype=jnp.float32, mesh=layout)
    if index:
        leader_follower.follow_engine(model, CONFIG, next_model=lambda: model)
        return
    with tempfile.TemporaryDirectory() as directory:
        testing.write_tiny_tokenizer(directory)
        served = engine.Engine(model, tokenizer.Tokenizer.load(directory), CONFIG)
    prompts = [[7, 8, 9] * 6 + [n] for n in range(6)]
    requests = [
        served.submit(prompt, options.Options(max_tokens=12, seed=n, repetition_penalty=1 + n / 9))
        for n, prompt in enumerate(prompts)
    ]
    for _ in range(4):
        served.step()
    served.preempt(requests[0])
    served.swap_weights(model)
    served.run()
    outputs = [request.output() for request in requests]
    tokens = [[(t.id, t.logp, t.logp_raw) for t in output.tokens] for output in outputs]
    print(json.dumps([tokens, [request.routes.tolist() for request in requests]]))
    served.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

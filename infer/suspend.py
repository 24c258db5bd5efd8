"""Requests under way, on disk: a service stops, and another goes on where it was.

    suspend.save(engine, path)            # ends them as "suspended"
    requests = suspend.resume(engine, path)   # of another process, of the same model

The file holds what a sequence is made of and nothing of what is computed from it: prompt, options,
and the tokens so far with their log-probabilities. An engine computes the rest again, as it does
after a preemption, so the outputs are those of an undisturbed run, to the bit, if all tokens of
a request are of one version of the weights.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt

from infer import engine as engine_lib
from infer import options as options_lib
from infer import request as request_lib
from m1_jax import tokenizer as tokenizer_lib

_FORMAT = "m1_jax suspended requests, version 1"


def save_requests(engine: engine_lib.Engine, path) -> int:
    """Write all requests under way to a file, whole or not at all, and end them; return how many.

    Tokens that the device has made and the engine not yet taken are made again later.

    Raises:
      OSError: the file cannot be written; all requests go on.
    """
    count = 0

    def keep(requests):
        nonlocal count
        count = len(requests)
        value = {
            "format": _FORMAT,
            "made_by": _engine_identity(engine),
            "version": engine.version,
            "requests": [_request_to_json(request) for request in requests],
        }
        _write_atomically(pathlib.Path(path), json.dumps(value, allow_nan=False))

    engine.suspend(keep)
    return count


def resume_requests(
    engine: engine_lib.Engine, path, on_token: Callable | None = None
) -> list[request_lib.Request]:
    """Submit the requests of a file that `save_requests` wrote, in order; they go on after their tokens.

    Args:
      engine: of the same model, weights, tokenizer and recipe; its `version` becomes the file's,
        if that is larger.
      path: stays as it is.
      on_token: as in `Engine.submit`; called for new tokens only.

    Raises:
      ValueError: another model, or a file that is none of `save_requests`, or requests that this engine is
        too small for. OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    value = _read_file(path)
    own = _engine_identity(engine)
    for name, made_by in value["made_by"].items():
        if own.get(name) != made_by:
            raise ValueError(
                f"{path}: got requests of another {name}: {made_by!r:.300}; this engine has "
                f"{own.get(name)!r:.300}. Start one with the checkpoint and sizes that made them."
            )
    parsed = [_parse_request(path, i, one) for i, one in enumerate(value["requests"])]
    for i, (prompt, options, _, _) in enumerate(parsed):  # before any of them starts
        if len(prompt) + options.max_tokens > engine.config.max_length:
            raise ValueError(
                f"{path}: request {i}: got {len(prompt)} prompt tokens and max_tokens "
                f"{options.max_tokens}; wanted {engine.config.max_length} at most (max_length): "
                "start the engine with more"
            )
    engine.continue_from_version(value["version"])
    requests = []
    for prompt, options, tokens, cached in parsed:
        request = engine.submit(prompt, options, on_token, prior_tokens=tokens)
        request.cached_tokens, request.cache_reason = cached
        requests.append(request)
    return requests


def _request_to_json(request: request_lib.Request) -> dict[str, Any]:
    return {
        "prompt": list(request.prompt),
        "options": options_lib.as_json(request.options),
        "tokens": [
            [t.id, _logp_to_json(t.logp), _logp_to_json(t.logp_raw), t.version, _top_to_json(t.top)]
            for t in request.tokens
        ],
        "cached": [request.cached_tokens, request.cache_reason],
    }


def _parse_request(path: pathlib.Path, number: int, value: dict[str, Any]) -> tuple:
    """Return prompt, options, tokens and what the cache had."""
    try:
        tokens = [
            request_lib.Token(
                id_,
                _logp_from_json(logp),
                _logp_from_json(raw),
                version,
                tuple((i, _logp_from_json(p)) for i, p in top),
            )
            for id_, logp, raw, version, top in value["tokens"]
        ]
        options = options_lib.from_json(value["options"])
        return tuple(value["prompt"]), options, tokens, tuple(value["cached"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: request {number}: {error!r}; the file is damaged") from None


def _top_to_json(top: tuple[tuple[int, float], ...]) -> list[list]:
    return [[i, _logp_to_json(logp)] for i, logp in top]


def _logp_to_json(logp: float) -> float | None:
    """JSON has no infinity: None is the log-probability of what could not have been chosen."""
    return None if logp == -math.inf else logp


def _logp_from_json(value: float | None) -> float:
    return -math.inf if value is None else value


def _engine_identity(engine: engine_lib.Engine) -> dict[str, Any]:
    """Return what an output's bits depend on, beside the request."""
    config = engine.config
    mesh = next((getattr(x.sharding, "mesh", None) for x in engine.weights), None)
    return {
        "model": json.loads(json.dumps(dataclasses.asdict(engine.model_config), default=str)),
        "weights": digest_arrays(engine.weights),
        "tokenizer": _digest_tokenizer(engine.tokenizer),
        "recipe": {
            "chunk_tokens": config.chunk_tokens,
            "tile_rows": config.attention_tile,
            "row_tile": config.matmul_tile,
            "mesh": {} if mesh is None else {k: v for k, v in mesh.shape.items() if v > 1},
            "backend": jax.default_backend(),
        },
    }


def digest_arrays(leaves: list[Array]) -> str:
    """Return a digest of arrays' shapes, dtypes and bits; compiles one small program."""
    told = [f"{leaf.dtype}{leaf.shape}" for leaf in leaves]
    # Other processes would have to be asked: of arrays that they share, this one's first part.
    leaves = [x if x.is_fully_addressable else x.addressable_data(0) for x in leaves]
    # Unnamed leaves: shape checks refuse the descriptions that lowering would put into pytrees.
    sums = jax.jit(lambda *x: jnp.stack([_bit_sum(leaf) for leaf in x]))(*leaves)
    return hashlib.sha256(f"{told} {np.asarray(sums).tolist()}".encode()).hexdigest()


def _bit_sum(x: Shaped[Array, "..."]) -> UInt[Array, ""]:
    """Return the sum of all bits, weighted by place so that no two values can be exchanged."""
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
    weight = jnp.ones(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        # Odd multipliers, each axis its own.
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        weight = weight * jnp.uint32(0x9E3779B1 + 2 * axis) + 2 * place
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _digest_tokenizer(tokenizer: tokenizer_lib.Tokenizer) -> str:
    hashed = hashlib.sha256(repr(tokenizer.stop_ids).encode())
    for token in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token, skip_special=False)
        hashed.update(len(data).to_bytes(4, "little") + data)
    return hashed.hexdigest()


def _write_atomically(path: pathlib.Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a crash."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read_file(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; wanted a file of suspend.save") from None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError(f"{path}: got no {_FORMAT!r}; wanted a file of suspend.save")
    return value

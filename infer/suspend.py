"""Requests under way, on disk: a service stops, and another goes on where it was.

    suspend.save_requests(engine, path)              # ends them as "suspended"
    requests = suspend.resume_requests(engine, path) # of another process, of the same model

The file holds what a sequence is made of and nothing of what is computed from it: prompt, options,
and the tokens so far with their log-probabilities. An engine computes the rest again, as it does
after a preemption. The outputs are bit-exact with those of an undisturbed run, if all tokens of
a request are of one version of the weights.
"""

import dataclasses
import hashlib
import json
import math
import operator
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt

from infer import config as config_lib
from infer import engine as engine_lib
from infer import options as options_lib
from infer import request as request_lib
from m1_jax import durable, file_lock, strict_json
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.serving import implementations

_FORMAT = "m1_jax suspended requests, version 1"


def save_requests(engine: engine_lib.Engine, path: str | os.PathLike) -> int:
    """Write all requests under way to a file, whole or not at all, and end them.

    Tokens that the device has made and the engine not yet taken are made again later.

    Returns:
      The number of requests.

    Raises:
      OSError: the file cannot be written. All requests go on.
      file_lock.LockError: another process writes to it. Likewise.
    """
    path = pathlib.Path(path).expanduser()
    count = 0

    # Called under the engine's lock: nothing moves between the writing and the ending.
    def write_requests(requests: list[request_lib.Request]) -> None:
        nonlocal count
        count = len(requests)
        value = {
            "format": _FORMAT,
            "made_by": _engine_identity(engine),
            "version": engine.version,
            "requests": [_request_to_json(request) for request in requests],
        }
        durable.write_text_atomically(path, json.dumps(value, allow_nan=False))

    with file_lock.hold_lock(path, "writes suspended requests to"):
        engine.suspend(write_requests)
    return count


def resume_requests(
    engine: engine_lib.Engine, path: str | os.PathLike, on_token: Callable | None = None
) -> list[request_lib.Request]:
    """Submit the requests of a file that `save_requests` wrote, to go on after their tokens.

    Args:
      engine: an engine of the same model, weights, tokenizer and recipe. Its `version` becomes the
        file's, if that is larger.
      path: the file. It stays as it is.
      on_token: the callback of `Engine.submit`, called for new tokens only.

    Returns:
      The requests, in the file's order.

    Raises:
      ValueError: another model, or a file that `save_requests` did not write, or requests that
        this engine is too small for. Then none of them is submitted.
      OSError: the file cannot be read.
    """
    path = pathlib.Path(path).expanduser()
    value = _read_file(path)
    if isinstance(recipe := value["made_by"].get("recipe"), dict):
        recipe.setdefault("attention", implementations.XLA_ONLY)  # of files that do not say
    identity = _engine_identity(engine)
    # With other weights or sizes the rest of an output would be plausible, but not bit-exact.
    for name, here in identity.items():
        if (made_by := value["made_by"].get(name)) != here:
            raise ValueError(
                f"{path}: got requests of another {name}: {made_by!r:.300}; this engine has "
                f"{here!r:.300}. Start one with the checkpoint and sizes that made them."
            )
    suspended = [_parse_request(path, i, entry) for i, entry in enumerate(value["requests"])]
    # All are checked before any of them starts.
    requests = []
    for number, (prompt, options, tokens, cached) in enumerate(suspended):
        _check_length(f"{path}: request {number}", prompt, options, engine.config)
        try:
            request = engine.prepare_request(prompt, options, on_token, prior_tokens=tokens)
        except ValueError as error:
            raise ValueError(f"{path}: request {number}: {error}") from None
        # What the first engine's cache had: this engine reports that, not its own recomputation.
        request.cached_tokens, request.cache_miss_reason = cached
        requests.append(request)
    engine.continue_from_version(value["version"])
    engine.submit_prepared(requests, is_resumed=True)
    return requests


def _check_length(
    location: str,
    prompt: tuple[int, ...],
    options: options_lib.Options,
    config: config_lib.EngineConfig,
) -> None:
    """Raise ValueError for a request that an engine of these sizes is too small for."""
    # The last token is never computed, so it needs no page.
    limits = {
        "max_length": config.max_length,
        "num_pages": config.total_pages * config.chunk_tokens + 1,
    }
    for name, longest in limits.items():
        if len(prompt) + options.max_tokens > longest:
            raise ValueError(
                f"{location}: got {len(prompt)} prompt tokens and max_tokens "
                f"{options.max_tokens}; wanted {longest} at most ({name}): start the engine with "
                "more"
            )


def _request_to_json(request: request_lib.Request) -> dict[str, Any]:
    options = options_lib.options_to_json(request.options)
    if isinstance(request.options.json_schema, Mapping):
        # As text: the file then is no deeper than its reader allows, whatever the schema is.
        options["json_schema"] = json.dumps(dict(request.options.json_schema))
    return {
        "prompt": list(request.prompt),
        "options": options,
        "tokens": [
            [
                token.id,
                _logp_to_json(token.logp),
                _logp_to_json(token.logp_raw),
                token.version,
                _top_to_json(token.top),
            ]
            for token in request.tokens
        ],
        "cached": [request.cached_tokens, request.cache_miss_reason],
    }


class _SuspendedRequest(NamedTuple):
    """A request of a file.

    Attributes:
      prompt: token ids.
      options: the options that were asked for.
      tokens: its output so far.
      cached: prompt tokens that the first engine's cache had, and why none if 0.
    """

    prompt: tuple[int, ...]
    options: options_lib.Options
    tokens: list[request_lib.OutputToken]
    cached: tuple[int, str]


def _parse_request(path: pathlib.Path, number: int, value: dict[str, Any]) -> _SuspendedRequest:
    try:
        tokens = [
            request_lib.OutputToken(
                operator.index(token_id),
                _logp_from_json(logp),
                _logp_from_json(logp_raw),
                operator.index(version),
                tuple((operator.index(i), _logp_from_json(top_logp)) for i, top_logp in top),
            )
            for token_id, logp, logp_raw, version, top in value["tokens"]
        ]
        cached_tokens, cache_miss_reason = value["cached"]
        return _SuspendedRequest(
            tuple(value["prompt"]),
            options_lib.options_from_json(value["options"]),
            tokens,
            (operator.index(cached_tokens), str(cache_miss_reason)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: request {number}: {error!r}; the file is damaged") from None


def _top_to_json(top: tuple[tuple[int, float], ...]) -> list[list]:
    return [[token_id, _logp_to_json(logp)] for token_id, logp in top]


def _logp_to_json(logp: float) -> float | None:
    """JSON has no infinity: None is the log-probability of what could not have been chosen."""
    return None if logp == -math.inf else logp


def _logp_from_json(value: float | None) -> float:
    return -math.inf if value is None else float(value)


def _engine_identity(engine: engine_lib.Engine) -> dict[str, Any]:
    """Return what an output's bits depend on, beside the request."""
    config = engine.config
    mesh = next((getattr(leaf.sharding, "mesh", None) for leaf in engine.weights), None)
    return {
        # Through JSON, so that it equals what a file has: lists for tuples, text for the rest.
        "model": json.loads(json.dumps(dataclasses.asdict(engine.model_config), default=str)),
        "weights": digest_arrays(engine.weights),
        "tokenizer": _digest_tokenizer(engine.tokenizer),
        "recipe": {
            # Keys of the file's format, older than the names of the config.
            "chunk_tokens": config.chunk_tokens,
            "tile_rows": config.attention_tile,
            "row_tile": config.matmul_tile,
            # Axes of one device split nothing.
            "mesh": {} if mesh is None else {k: v for k, v in mesh.shape.items() if v > 1},
            "backend": jax.default_backend(),
            "attention": engine.attention_implementations,
        },
    }


def digest_arrays(leaves: list[Array]) -> str:
    """Return a digest of arrays' shapes, dtypes and bits. The first call compiles a program."""
    shapes = [f"{leaf.dtype}{leaf.shape}" for leaf in leaves]
    # Only the shards of this process can be read without asking the others. Of arrays that span
    # processes the first of these counts.
    leaves = [leaf if leaf.is_fully_addressable else leaf.addressable_data(0) for leaf in leaves]
    # Leaves go in one by one: shape checks refuse the descriptions that lowering would put into
    # pytrees. Of one function, so that JAX compiles it once for each list of shapes.
    sums = jax.jit(_sum_arrays)(*leaves)
    return hashlib.sha256(f"{shapes} {np.asarray(sums).tolist()}".encode()).hexdigest()


def _sum_arrays(*leaves: Shaped[Array, "..."]) -> UInt[Array, "L"]:
    return jnp.stack([_sum_weighted_bits(leaf) for leaf in leaves])


def _sum_weighted_bits(x: Shaped[Array, "..."]) -> UInt[Array, ""]:
    """Return the sum of all bits, weighted by index so that no two values can be exchanged."""
    # Like the digest of `train.checkpoints` in purpose, not in numbers: files on disk hold both.
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
    weight = jnp.ones(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        # Odd multipliers, each axis its own. Products and sums wrap at 2^32.
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        weight = weight * jnp.uint32(0x9E3779B1 + 2 * axis) + 2 * index
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _digest_tokenizer(tokenizer: tokenizer_lib.Tokenizer) -> str:
    hashed = hashlib.sha256(repr(tokenizer.stop_ids).encode())
    for token in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token, skip_special=False)
        hashed.update(len(data).to_bytes(4, "little") + data)
    return hashed.hexdigest()


def _read_file(path: pathlib.Path) -> dict[str, Any]:
    """Return a file's value, whose outermost parts are those that `save_requests` wrote."""
    try:
        value = strict_json.parse_json(path.read_bytes(), str(path))
    except strict_json.JsonError as error:
        raise ValueError(f"{error}: not JSON; wanted a file of suspend.save_requests") from None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError(f"{path}: got no {_FORMAT!r}; wanted a file of suspend.save_requests")
    for name, kind in {"made_by": dict, "version": int, "requests": list}.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(
                f"{path}: {name}: got {value.get(name)!r:.80}; wanted a {kind.__name__}: the file "
                "is damaged"
            )
    return value

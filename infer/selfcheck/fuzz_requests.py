"""Requests for `engine_fuzz.py`: their options, what they give alone, and the engines' sizes."""

import dataclasses
import random
import time
from typing import Any

import jax.numpy as jnp
from flax import nnx

from infer import config as config_lib
from infer import engine as engine_lib
from infer import options as options_lib
from infer import request
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import tokenizer as tokenizer_lib

CHUNK_TOKENS, MAX_LENGTH = 16, 256
POISON = 0  # the token whose embedding is NaN; also the padding token
SHARED_SIZES: dict[str, Any] = {"max_length": MAX_LENGTH, "chunk_tokens": CHUNK_TOKENS}
REFERENCE_CONFIG = config_lib.EngineConfig(
    **SHARED_SIZES,
    max_rows=1,
    num_snapshots=0,
    prefix_cache=False,
    decode_steps=1,
    prefill_tokens=(64,),
)
BUSY_CONFIGS = (
    # 16 pages hold one sequence of max_length.
    config_lib.EngineConfig(
        **SHARED_SIZES,
        max_rows=4,
        num_pages=24,
        num_snapshots=4,
        decode_steps=4,
        prefill_tokens=(32, 64),
        snapshot_every_tokens=64,
        swap_tokens=48,
        host_bytes=2**20,
        max_queue=12,
    ),
    config_lib.EngineConfig(
        **SHARED_SIZES,
        max_rows=12,
        num_pages=40,
        num_snapshots=2,
        decode_steps=7,
        prefill_tokens=(16, 128),
        snapshot_every_tokens=0,
        swap_tokens=1,
        host_bytes=2**22,
        max_queue=20,
        draft_tokens=5,
        record_routes=True,
    ),
    config_lib.EngineConfig(
        **SHARED_SIZES,
        max_rows=2,
        num_snapshots=8,
        decode_steps=1,
        prefill_tokens=(24,),
        max_queue=6,
    ),
)


@dataclasses.dataclass(frozen=True)
class FuzzCase:
    """A request, and its output when it is served alone."""

    prompt: tuple[int, ...]
    options: options_lib.Options
    output: request.RequestOutput


def make_model(dtype: jnp.dtype, head_dim: int = 32) -> model_lib.MiniMaxM1:
    """Return a tiny model with clear preferences, an irregular list of layers, and a NaN token.

    Args:
      head_dim: width of a head. Kernels for TPU take multiples of 128.
    """
    kinds = (model_config_lib.LIGHTNING, model_config_lib.SOFTMAX)
    config = dataclasses.replace(
        model_config_lib.ModelConfig.tiny(),
        layer_types=tuple(kinds[i] for i in (0, 0, 1, 0)),
        initializer_range=0.1,
        head_dim=head_dim,
    )
    model = model_lib.MiniMaxM1(config, nnx.Rngs(0), dtype=dtype)
    model.embed.table[...] = model.embed.table[...].at[POISON].set(jnp.nan)
    return model


def make_cases(
    reference: engine_lib.Engine,
    tokenizer: tokenizer_lib.Tokenizer,
    rng: random.Random,
    num_cases: int,
    deadline: float = float("inf"),
) -> list[FuzzCase]:
    """Serve a pool of requests one by one, at least one and none after the deadline."""
    cases: list[FuzzCase] = []
    while len(cases) < num_cases and (not cases or time.monotonic() < deadline):
        prompt = draw_prompt(rng, cases)
        options = draw_options(rng, tokenizer)
        (output,) = reference.generate([prompt], options)
        cases.append(FuzzCase(prompt, options, output))
    return cases


def draw_prompt(rng: random.Random, cases: list[FuzzCase]) -> tuple[int, ...]:
    """Return 1 to 200 tokens: new ones, alone or after another prompt's beginning or its answer."""
    tokens = tuple(rng.randrange(1, 500) for _ in range(rng.choice((1, 2, 9, 16, 33, 70, 140))))
    kind = rng.random()
    if cases and kind < 0.4:
        prefix = rng.choice(cases).prompt
        tokens = prefix[: rng.randint(1, len(prefix))] + tokens
    elif cases and kind < 0.8:
        case = rng.choice(cases)
        tokens = case.prompt + tuple(token.id for token in case.output.tokens) + tokens
    if POISON in tokens and rng.random() < 0.8:
        tokens = tuple(token or 1 for token in tokens)
    elif rng.random() < 0.03:
        tokens = (*tokens[:100], POISON, *tokens[:40])
    return tokens[:200]


def draw_options(rng: random.Random, tokenizer: tokenizer_lib.Tokenizer) -> options_lib.Options:
    """Return options of any kind. Where text matters, a bias makes letters likely."""
    values: dict = {"seed": rng.randrange(2**32), "max_tokens": rng.randint(1, 40)}

    def set_with_chance(chance, **choices):
        for name, options in choices.items():
            if rng.random() < chance:
                values[name] = rng.choice(options)

    set_with_chance(
        0.5, temperature=(0, 0.3, 1.7), top_p=(0.3, 1.0), top_k=(1, 5, 50), min_p=(0.1, 0.5)
    )
    set_with_chance(0.25, repetition_penalty=(0.8, 1.3), presence_penalty=(-1, 1.5))
    set_with_chance(0.25, frequency_penalty=(-0.5, 2), top_logprobs=(1, 5, 20))
    set_with_chance(0.2, stop_token_ids=((64, 65), (300, 301, 302)), ignore_eos=(True,))
    set_with_chance(0.2, min_tokens=(1, values["max_tokens"]), stop_on_loop=(True,))
    ids = rng.sample(range(1, 512), 8)
    bias = {token: rng.uniform(-100, 8) for token in ids} if rng.random() < 0.3 else {}
    kind = rng.randrange(9)
    if kind == 0:  # stop strings that span tokens
        bias |= dict.fromkeys(tokenizer.encode("abcdefghij"), 9.0)
        values["stop"] = rng.choice((("ab", "cde"), ("fa", "hhh", "ij"), ("d",)))
    elif kind in (
        1,
        8,
    ):  # an open thought: falling biases and penalties give `<`, `think`, `>` in turn
        bias = dict(zip(tokenizer.encode("<think>"), (100, 98.6, 97.3), strict=True))
        values |= {"temperature": 0, "presence_penalty": 2, "frequency_penalty": 2}
        values |= {"thinking_tokens": rng.randrange(20), "repetition_penalty": 1.0}
        values |= {"max_tokens": rng.randint(20, 40), "min_tokens": 0}
    elif kind in (2, 3):
        values |= {"min_tokens": 0, "ignore_eos": False, "max_tokens": rng.randint(8, 40)}
        values |= rng.choice(
            (
                {"regex": "[a-f]{2,20}[0-9]"},
                {"json_schema": {"type": "array", "items": {"enum": ["a", 1, None]}}},
                {"grammar": 'start: "(" start ")" | /[a-z]{1,3}/'},
                {"regex": "[0-9]+", "after_thinking": True, "thinking_tokens": 9},
            )
        )
    elif kind == 4 and rng.random() < 0.3:
        bias |= {POISON: 12.0}
    elif kind == 5:
        values["stop_token_ids"] = tuple(rng.sample(range(1, 500), 7))
    return options_lib.Options(logit_bias=bias, **values)


def comparable_output(output: request.RequestOutput) -> list:
    """Return what must be equal: the tokens, then text, reason and number of thought tokens."""
    # Weights are put in place anew, which raises the version and changes no number.
    tokens = [dataclasses.replace(token, version=0) for token in output.tokens]
    return [*tokens, output.text, output.finish_reason, output.reasoning_tokens]

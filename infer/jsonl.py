"""Requests as files and flags hold them, and outputs as JSON.

A request is {"prompt": ..., "system": ...} or {"messages": [...], "tools": [...]}. With `raw` a
prompt is text for the model as it is. Without it the prompt is the user's message.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from infer import options as options_lib
from infer import prompt as prompt_lib
from infer import request as request_lib
from m1_jax import config as model_config_lib
from m1_jax import strict_json
from m1_jax import tokenizer as tokenizer_lib

_PROMPT_FIELDS, _CHAT_FIELDS = ("prompt", "system"), ("messages", "tools")
REQUEST_FIELDS = (*_PROMPT_FIELDS, *_CHAT_FIELDS)


def read_lines(path: pathlib.Path) -> list[tuple[str, str]]:
    """Return the lines of a file that are not blank, each after its location, FILE:LINE.

    Raises:
      ValueError: bytes that are not UTF-8.
      OSError: the file cannot be read.
    """
    try:
        # Not splitlines, which splits at characters that JSON strings may hold.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got bytes that are not UTF-8: {error}") from None
    numbered = enumerate(lines, start=1)
    return [(f"{path}:{n}", line.removesuffix("\r")) for n, line in numbered if line.strip()]


def parse_line(location: str, line: str) -> Any:
    """Return a line's JSON, or raise ValueError with the location."""
    try:
        return strict_json.DECODER.decode(line)
    except ValueError as error:
        raise ValueError(f"{location}: not JSON: {error}") from None


def check_conversation(location: str, value: Any, system: str | None, raw: bool) -> dict[str, Any]:
    """Return what `encode_request` takes: {"prompt": ...} if raw, else messages and tools.

    Args:
      location: the request's place, for errors.
      value: the request.
      system: system message of a prompt without its own.
      raw: the prompt is text for the model as it is, not a user's message.

    Raises:
      ValueError: other fields, or values of other kinds.
    """
    # Fields of both kinds at once are refused: one of them would be ignored.
    keys = set(value) if isinstance(value, dict) else None
    if keys is None or not (keys <= set(_PROMPT_FIELDS) or keys <= set(_CHAT_FIELDS)):
        shown_value = sorted(keys) if keys else value
        raise ValueError(
            f'{location}: got {shown_value!r:.80}; wanted "prompt" and "system", or "messages" '
            'and "tools"'
        )
    if "messages" in value:
        if raw or system is not None:
            raise ValueError(f"{location}: got messages with --raw or --system; wanted neither")
        return value
    prompt, system = value.get("prompt"), value.get("system", system)
    # Without a system message there is nothing to check: "x" passes.
    for name, text in (("prompt", prompt), ("system", "x" if system is None else system)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{location}: {name}: got {text!r}; wanted a text that is not empty")
    if not raw:
        system_messages = [] if system is None else [{"role": "system", "content": system}]
        return {"messages": [*system_messages, {"role": "user", "content": prompt}]}
    if system is not None:
        raise ValueError(f"{location}: system: got one with --raw, which has no place for it")
    return {"prompt": prompt}


def encode_request(
    location: str, tokenizer: tokenizer_lib.Tokenizer, value: Mapping[str, Any], profile: str
) -> list[int]:
    """Return the token ids of a request that `check_conversation` returned.

    Raises:
      ValueError: messages or tools that cannot be rendered.
    """
    try:
        if "prompt" in value:  # raw: its control tokens count
            return tokenizer.encode(value["prompt"], allow_special=True)
        return prompt_lib.encode_prompt(
            tokenizer, value["messages"], value.get("tools"), profile=profile
        )
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from None


def check_prompt_length(
    location: str,
    ids: Sequence[int],
    max_tokens: int,
    model_config: model_config_lib.ModelConfig,
    max_length: int = 0,
) -> None:
    """Raise ValueError for a prompt that is empty, too long or outside of the vocabulary.

    Args:
      location: the request's place, for errors.
      ids: the prompt.
      max_tokens: the most tokens of the output.
      model_config: has the model's own limits.
      max_length: a lower limit on prompt and output together, in tokens. 0: none.
    """
    model_limit = model_config.max_position_embeddings
    limit, remedy = model_limit, "lower --max_tokens (the model allows no more)"
    if 0 < max_length < model_limit:
        limit, remedy = max_length, "raise --max_length"
    if not ids:
        raise ValueError(f"{location}: got no tokens; wanted at least one")
    if len(ids) + max_tokens > limit:
        raise ValueError(
            f"{location}: got {len(ids)} tokens + max_tokens {max_tokens} = "
            f"{len(ids) + max_tokens}; wanted at most {limit}. Shorten the prompt or {remedy}."
        )
    # A tokenizer of another model may have more ids.
    bad = [token for token in ids if not 0 <= token < model_config.vocab_size]
    if bad:
        raise ValueError(
            f"{location}: got token id {bad[0]}; wanted 0 to {model_config.vocab_size - 1}. "
            "Does the tokenizer belong to this model?"
        )


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of one request from the run's seed and the request's index.

    Index 0 has the run's own seed. All requests of a run have different seeds. Two runs whose seeds
    are less than 200 apart have no seed in common up to a million requests: multiples of 2^32 over
    the golden ratio lie far from each other.
    """
    return (seed + index * 0x9E3779B9) % 2**32


def tokens_to_json(tokens: Sequence[request_lib.OutputToken]) -> list[dict[str, Any]]:
    """Return output tokens as JSON. A log-probability of minus infinity becomes null."""
    records = []
    for token in tokens:
        record: dict[str, Any] = {
            "id": token.id,
            "logp": finite_or_none(token.logp),
            "logp_raw": finite_or_none(token.logp_raw),
        }
        if token.top:
            record["top"] = [[token_id, finite_or_none(logp)] for token_id, logp in token.top]
        records.append(record)
    return records


def finite_or_none(logp: float) -> float | None:
    """Return a finite value, or None: JSON has no infinity."""
    return logp if math.isfinite(logp) else None


def options_from_fields(
    base: options_lib.Options, values: Mapping[str, Any]
) -> options_lib.Options:
    """Return options with fields replaced by JSON values. A "preset" replaces all fields first.

    Raises:
      ValueError: an unknown field, or what `options.Options` refuses.
    """
    values = dict(values)  # a copy, as the preset is taken out
    if "preset" in values:
        base = options_lib.preset_options(values.pop("preset"))
    return options_lib.options_from_json(values, base)

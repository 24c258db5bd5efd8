"""Requests as files and flags hold them, and outputs as JSON.

A request is {"prompt": ..., "system": ...} or {"messages": [...], "tools": [...]}. With `raw` a
prompt is text for the model as it is. Without it the prompt is the user's message. A field that is
null counts as absent, as clients write all fields.
"""

import contextlib
import math
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infer import config as config_lib
from infer import options as options_lib
from infer import prompt as prompt_lib
from infer import request as request_lib
from m1_jax import config as model_config_lib
from m1_jax import strict_json
from m1_jax import tokenizer as tokenizer_lib

_PROMPT_FIELDS, _CHAT_FIELDS = ("prompt", "system"), ("messages", "tools")
REQUEST_FIELDS = (*_PROMPT_FIELDS, *_CHAT_FIELDS)
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")  # in any case
_MAX_ERROR_CHARS = 250  # of the error about one line
_MAX_EXACT_FLOAT = 2**53  # up to here a float holds every whole number
_OPTION_TYPES = typing.get_type_hints(options_lib.Options)


# ---- files and lines


def read_text(path: pathlib.Path) -> str:
    r"""Return the text of a file, without a byte order mark and with "\n" as its line ends.

    Raises:
      ValueError: bytes that are not UTF-8, or NULs.
      OSError: the file cannot be read.
    """
    data = path.read_bytes()
    try:
        text = _unify_line_ends(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        # The codec's own copy of the bytes lacks the mark, which `error.start` does not count.
        valid_text = _unify_line_ends(error.object[: error.start].decode("utf-8"))
        problem = f"bytes that are not UTF-8, the first one 0x{error.object[error.start]:02x}"
    else:
        if "\0" not in text:
            return text
        # UTF-16 without a mark is UTF-8 with NULs, too.
        valid_text, problem = text.partition("\0")[0], "a NUL character"
    line_number = valid_text.count("\n") + 1
    raise ValueError(f"{path}:{line_number}: got {problem}; save the file as text in UTF-8")


def read_lines(path: pathlib.Path) -> list[tuple[str, str]]:
    """Return the lines of a file that are not blank, each after its location, FILE:LINE.

    Raises the errors of `read_text`.
    """
    return _split_lines(path, read_text(path))


def read_json_lines(path: pathlib.Path) -> list[tuple[str, str]]:
    """Return the lines of a file of JSON lines, as `read_lines` does.

    Raises:
      ValueError: bytes that are not UTF-8, or a file that is one JSON value as a whole.
      OSError: the file cannot be read.
    """
    text = read_text(path)  # once: it may be a pipe
    lines = _split_lines(path, text)
    if lines and not isinstance(_parse_or_none(lines[0][1]), dict):
        value = _parse_or_none(text)
        is_array = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        if is_array or isinstance(value, dict):
            raise ValueError(
                f"{path}: got one JSON {'array' if is_array else 'object'}; wanted an object per "
                f"line: jq -c '{'.[]' if is_array else '.'}' OLD > NEW"
            )
    return lines


def parse_line(location: str, line: str | bytes) -> Any:
    """Return a line's JSON.

    Raises:
      ValueError: no valid JSON, or text that UTF-8 cannot hold. The message begins with the
        location.
    """
    value = strict_json.parse_json(line, location)
    if text := _find_surrogate(value):
        char = next(char for char in text if "\ud800" <= char <= "\udfff")
        raise ValueError(
            f"{location}: got a lone surrogate {char!r} in {text!r:.80}; wanted text that UTF-8 "
            "can hold"
        )
    return value


@contextlib.contextmanager
def locate_errors(location: str) -> Iterator[None]:
    """Make a ValueError one short line that begins with the location."""
    try:
        yield
    except ValueError as error:
        # Some errors name the location themselves.
        message = " ".join(str(error).removeprefix(f"{location}: ").split())
        room = max(_MAX_ERROR_CHARS - len(location) - 2, 100)
        if len(message) > room:
            # An error says what it got first, and what to do at its end.
            end = room // 3
            message = f"{message[: room - end - 5]} ... {message[-end:]}"
        raise ValueError(f"{location}: {message}") from None


def read_conversations(
    path: pathlib.Path, system: str | None, raw: bool
) -> list[tuple[str, dict[str, Any]]]:
    """Return the requests of a file of prompts, each after its location.

    The file has an object per line if it is named as JSON lines are, else a prompt per line.

    Args:
      path: the file.
      system, raw: as in `check_conversation`.

    Raises:
      ValueError: no requests, or a line that is none.
      OSError: the file cannot be read.
    """
    has_objects = path.suffix.lower() in _JSON_LINES_SUFFIXES
    requests = []
    for location, line in read_json_lines(path) if has_objects else read_lines(path):
        with locate_errors(location):
            value = parse_line(location, line) if has_objects else _plain_prompt(line)
            requests.append((location, check_conversation(value, system, raw)))
    if not requests:
        raise ValueError(f"{path}: got no prompts; wanted one per line")
    return requests


def _split_lines(path: pathlib.Path, text: str) -> list[tuple[str, str]]:
    # Not splitlines, which splits at characters that JSON strings may hold. Files that were put
    # together have byte order marks inside.
    lines = (line.removeprefix("\ufeff") for line in text.split("\n"))
    return [(f"{path}:{n}", line) for n, line in enumerate(lines, start=1) if line.strip()]


def _unify_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _find_surrogate(value: Any) -> str | None:
    """Return a text of a JSON value that UTF-8 cannot hold, or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value
        return None
    items = [*value, *value.values()] if isinstance(value, dict) else value
    texts = map(_find_surrogate, items if isinstance(items, list) else ())
    return next(filter(None, texts), None)


def _parse_or_none(text: str) -> Any:
    """Return the value of a JSON text, None for no JSON."""
    try:
        return strict_json.parse_json(text, "")
    except strict_json.JsonError:
        return None


def _plain_prompt(line: str) -> dict[str, Any]:
    """Return the request of a line of plain text.

    Raises:
      ValueError: a request as JSON. The model would read the JSON.
    """
    value = _parse_or_none(line)
    if isinstance(value, dict) and not value.keys().isdisjoint(("prompt", "messages", "custom_id")):
        raise ValueError(
            "got a request as JSON in a file of plain prompts; name the file .jsonl, or give the "
            "text alone"
        )
    return {"prompt": line}


# ---- requests


def drop_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not null: null is absence."""
    return {name: field for name, field in value.items() if field is not None}


def refuse_openai_batch(value: Mapping[str, Any]) -> None:
    """Raise ValueError for a line of OpenAI's batch API, which has its request in "body"."""
    if isinstance(value.get("body"), Mapping):
        raise ValueError(
            "got a line of OpenAI's batch API, which m1-batch reads; wanted the body's messages in "
            "the line itself: jq -c '.body | {messages, tools}' OLD > NEW"
        )


def check_conversation(value: Any, system: str | None, raw: bool) -> dict[str, Any]:
    """Return what `encode_request` takes: {"prompt": ...} if raw, else messages and tools.

    Args:
      value: the request.
      system: system message of a prompt without its own.
      raw: the prompt is text for the model as it is, not a user's message.

    Raises:
      ValueError: other fields, or values of other kinds.
    """
    if isinstance(value, dict):
        refuse_openai_batch(value)
        value = drop_nulls(value)
    # Fields of both kinds at once are refused: one of them would be ignored.
    keys = set(value) if isinstance(value, dict) else None
    if keys is None or not (keys <= set(_PROMPT_FIELDS) or keys <= set(_CHAT_FIELDS)):
        shown_value = sorted(keys) if keys else value
        raise ValueError(
            f'got {shown_value!r:.80}; wanted "prompt" and "system", or "messages" and "tools" '
            "(options are flags of infer.generate, and fields of infer.offline's lines)"
        )
    if "messages" in value:
        if raw or system is not None:
            raise ValueError("got messages with --raw or --system; wanted neither")
        return value
    prompt, system = value.get("prompt"), value.get("system", system)
    # Without a system message there is nothing to check: "x" passes.
    for name, text in (("prompt", prompt), ("system", "x" if system is None else system)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}: got {text!r:.80}; wanted a text that is not empty")
    if not raw:
        system_messages = [] if system is None else [{"role": "system", "content": system}]
        return {"messages": [*system_messages, {"role": "user", "content": prompt}]}
    if system is not None:
        raise ValueError("system: got one with --raw, which has no place for it")
    return {"prompt": prompt}


def encode_request(
    tokenizer: tokenizer_lib.Tokenizer, value: Mapping[str, Any], profile: str
) -> list[int]:
    """Return the token ids of a request that `check_conversation` returned.

    Raises:
      ValueError: messages or tools that cannot be rendered.
    """
    if "prompt" in value:  # raw: its control tokens count
        return tokenizer.encode(value["prompt"], allow_special=True)
    return prompt_lib.encode_prompt(
        tokenizer, value["messages"], value.get("tools"), profile=profile
    )


def check_prompt_length(
    ids: Sequence[int],
    max_tokens: int,
    model_config: model_config_lib.ModelConfig,
    max_length: int = 0,
    num_pages: int = 0,
) -> None:
    """Raise ValueError for a prompt that is empty, too long or outside of the vocabulary.

    Args:
      ids: the prompt.
      max_tokens: the most tokens of the output.
      model_config: has the model's own limits.
      max_length: a lower limit on prompt and output together, in tokens. 0: none.
      num_pages: pages of the engine's KV cache. 0: as many as needed.
    """
    limits = [(model_config.max_position_embeddings, "lower max_tokens (the model allows no more)")]
    if max_length:
        limits.append((max_length, "raise --max_length"))
    if num_pages:
        # One more than the pages hold, because the last token is never computed.
        pool_tokens = num_pages * config_lib.EngineConfig().chunk_tokens + 1
        limits.append((pool_tokens, "raise --num_pages"))
    limit, remedy = min(limits)
    if not ids:
        raise ValueError("got no tokens; wanted at least one")
    if len(ids) + max_tokens > limit:
        raise ValueError(
            f"got {len(ids)} tokens + max_tokens {max_tokens} = {len(ids) + max_tokens}; wanted "
            f"at most {limit}. Shorten the prompt or {remedy}."
        )
    # A tokenizer of another model may have more ids.
    bad = [token for token in ids if not 0 <= token < model_config.vocab_size]
    if bad:
        raise ValueError(
            f"got token id {bad[0]}; wanted 0 to {model_config.vocab_size - 1}. "
            "Does the tokenizer belong to this model?"
        )


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of one request from the run's seed and the request's index.

    Index 0 has the run's own seed. All requests of a run have different seeds. Two runs whose seeds
    are less than 200 apart have no seed in common up to a million requests: multiples of 2^32 over
    the golden ratio lie far from each other.
    """
    return (seed + index * 0x9E3779B9) % 2**32


# ---- options


def options_from_fields(
    base: options_lib.Options, values: Mapping[str, Any]
) -> options_lib.Options:
    """Return options with fields replaced by JSON values. A "preset" replaces all fields first.

    A field that is null keeps its value. A whole number may be written as 50.0, as data frames do.

    Raises:
      ValueError: an unknown field, or what `options.Options` refuses.
    """
    values = drop_nulls(values)
    if "preset" in values:
        preset = values.pop("preset")
        if not isinstance(preset, str):
            raise ValueError(f"preset: got {preset!r:.80}; wanted a preset's name")
        base = options_lib.preset_options(preset)
    values = {name: _unify_whole_numbers(name, value) for name, value in values.items()}
    return options_lib.options_from_json(values, base)


def to_whole_number(value: Any) -> Any:
    """Return a float without fraction as a whole number, and anything else as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT_FLOAT:
        return int(value)
    return value


def _unify_whole_numbers(name: str, value: Any) -> Any:
    """Return an option's value with whole numbers as `int`, where the option has whole numbers."""
    kinds = (_OPTION_TYPES.get(name), *typing.get_args(_OPTION_TYPES.get(name)))
    if int not in kinds or isinstance(value, Mapping):  # logit_bias has ids for keys alone
        return value
    return (
        [to_whole_number(item) for item in value]
        if isinstance(value, list)
        else (to_whole_number(value))
    )


# ---- outputs


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

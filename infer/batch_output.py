"""The output file of `infer.offline`: begun, appended to, and taken up again after a kill.

Beside OUTPUT lies OUTPUT.run.json, the fingerprint of the run (`batch_fingerprint`): all that its
lines depend on. A run goes on with an output only under the same fingerprint.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

from infer import jsonl
from infer import request as request_lib
from m1_jax import durable, strict_json
from m1_jax.serving import implementations

_MAX_NAMES = 3  # an error names so many files of a checkpoint


def begin_output(output: pathlib.Path, fingerprint: dict[str, Any], num_requests: int) -> set[int]:
    """Begin an output, or take up one that exists, and drop its torn last line.

    Returns:
      The indices of the requests that the output has.

    Raises:
      ValueError: the output was begun with another input or other options, or is no such file.
    """
    fingerprint_path = output.with_name(output.name + ".run.json")
    if not output.exists():
        # The fingerprint is complete before the output exists, whenever the process is killed.
        durable.write_text_atomically(fingerprint_path, json.dumps(fingerprint, indent=1) + "\n")
        output.touch()
        return set()
    if not fingerprint_path.exists():
        raise ValueError(
            f"--output: {output} exists, but {fingerprint_path.name} beside it does not; wanted a "
            "new file, or both. Give another --output."
        )
    saved = strict_json.parse_json(fingerprint_path.read_bytes(), str(fingerprint_path))
    if not isinstance(saved, dict):
        raise ValueError(
            f"{fingerprint_path}: got {saved!r:.80}; wanted an object. Give another --output."
        )
    # What runs did that did not write it down.
    saved.setdefault("attention", implementations.XLA_ONLY)
    if changes := _describe_changes(saved, fingerprint):
        raise ValueError(
            f"--output: {output} was begun with another {changes}. Give the same again, or another "
            "--output."
        )
    return read_done_indices(output, num_requests)


def read_done_indices(output: pathlib.Path, num_requests: int) -> set[int]:
    """Return the indices of whole lines, and cut off what follows the last of them.

    Raises:
      ValueError: a line that is not JSON, or an index that is out of range or there twice.
    """
    done_indices, end = set(), 0
    with output.open("r+b") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # torn by a kill
                break
            end += len(line)
            location = f"{output}:{line_number}"
            with jsonl.locate_errors(location):
                value = strict_json.parse_json(line, location)
                index = value.get("index") if isinstance(value, dict) else None
                # By type: true is an int in Python.
                is_known = type(index) is int and 0 <= index < num_requests
                if not is_known or index in done_indices:
                    raise ValueError(
                        f"got index {index!r:.80}; wanted each of 0 to {num_requests - 1} "
                        "once at most. Delete the line, or give another --output."
                    )
            done_indices.add(index)
        # The next line must not continue a torn one.
        file.truncate(end)
    return done_indices


def append_output(
    file: IO[bytes],
    fields: Mapping[str, Any],
    output: request_lib.RequestOutput,
    write_tokens: bool,
) -> None:
    """Append a request's line in one call, so that a kill tears at most the last line.

    Args:
      file: the output, open in binary mode.
      fields: the fields that the line begins with, which `encode_record` has taken before.
      output: the request's output.
      write_tokens: add each token with its log-probabilities.
    """
    record = {
        **fields,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": len(output.tokens),
        "reasoning_tokens": output.reasoning_tokens,
    }
    if write_tokens:
        record["tokens"] = jsonl.tokens_to_json(output.tokens)
    file.write(encode_record(record))
    file.flush()


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return a line of the output.

    Raises:
      ValueError: text that UTF-8 cannot hold.
    """
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _describe_changes(saved: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    """Return what a fingerprint has that differs from a saved one, empty if nothing does."""
    changed = [name for name in fingerprint if saved.get(name) != fingerprint[name]]
    if not changed:
        return ""
    old, new = saved.get(changed[0]), fingerprint[changed[0]]
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        detail = f"{', '.join(names[:_MAX_NAMES])}{more} changed"
    else:
        detail = f"{changed[0]}: got {new!r:.80}; wanted {old!r:.80}"
    return f"{' and '.join(changed)} ({detail})"

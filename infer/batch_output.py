"""The output file of `infer.offline`: begun, appended to, and taken up again after a kill.

Beside OUTPUT lies OUTPUT.run.json, the fingerprint of the run: all that its lines depend on. A run
goes on with an output only under the same fingerprint.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

from infer import jsonl
from infer import request as request_lib
from m1_jax import durable


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
    saved = jsonl.parse_line(str(fingerprint_path), fingerprint_path.read_text())
    changed = [name for name in fingerprint if saved.get(name) != fingerprint[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"--output: {output} was begun with another {' and '.join(changed)} ({name}: got "
            f"{fingerprint[name]!r:.80}; wanted {saved.get(name)!r:.80}). Give the same again, or "
            "another --output."
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
            value = jsonl.parse_line(f"{output}:{line_number}", line.decode())
            index = value.get("index") if isinstance(value, dict) else None
            if not isinstance(index, int) or not 0 <= index < num_requests or index in done_indices:
                raise ValueError(
                    f"{output}:{line_number}: got index {index!r}; wanted each of 0 to "
                    f"{num_requests - 1} "
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
      fields: the fields that the line begins with.
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
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()

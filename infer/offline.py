"""Command: many requests from a file, their outputs to another; killed and started, it goes on.

    python -m infer.offline --checkpoint=DIR --input=requests.jsonl --output=outputs.jsonl

A line of the input is {"prompt": ..., "system": ...} or {"messages": [...], "tools": [...]}, with
"id", "preset" and any field of `options.Options` where wanted: {"prompt": "Hi", "max_tokens": 9}.
All lines are checked before the first one runs. A line of the output has the request's "index" (of
lines that are not blank, from 0) and comes when its request is done:

    {"index": 0, "id": ..., "text": ..., "finish_reason": "stop", "prompt_tokens": 12,
     "completion_tokens": 40, "reasoning_tokens": 0}

and with --tokens also "tokens", with their log-probabilities. Beside it, OUTPUT.run.json says what
made it. The same command, started again, does what is missing, and a line is the same byte for byte
wherever the run was interrupted: a request without a seed has one of the run's seed and its index.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import tqdm
from absl import app, flags, logging

import m1_jax
from infer import command, engine, grammar, jsonl, stopping
from infer import config as config_lib
from infer import options as options_lib
from infer import prompt as prompt_lib
from infer import request as request_lib
from m1_jax import quantize
from m1_jax import tokenizer as tokenizer_lib

_flag = command.flag_field
_MAX_LISTED_BAD_LINES = 10  # told at once
_LINE_FIELDS = (*jsonl.REQUEST_FIELDS, "id", "preset")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """What to do; each field is a flag of the command."""

    checkpoint: str = _flag("", "Release directory, or one made by m1_jax.convert.")
    input: str = _flag("", "JSONL file of requests.")
    output: str = _flag("", "JSONL file to write, or to go on with.")
    defaults: str = _flag("{}", 'Options of lines without their own: {"max_tokens": 100, ...}.')
    seed: int = _flag(0, "With a line's index, the seed of lines without their own.")
    tokens: bool = _flag(False, "Write each token with its log-probabilities.")
    system: str | None = _flag(None, "System message of prompts that do not bring their own.")
    raw: bool = _flag(False, "Read prompts as they are, control tokens included: no template.")
    profile: str = _flag("release", "Chat template: release or vllm.")
    dtype: str = _flag("float32", "Of the computation: float32 or bfloat16.")
    weights: str | None = _flag(None, "int8-experts or int8-all round weights; else as dtype.")
    max_length: int = _flag(0, "Most tokens of prompt and output; 0: what the model allows.")
    max_rows: int = _flag(8, "Most sequences side by side.")
    num_pages: int = _flag(0, "Pages of 64 tokens of KV for all of them; 0: enough.")
    num_snapshots: int = _flag(8, "States kept for requests that begin alike.")
    draft_tokens: int = _flag(0, "Guess so many tokens from what was said before; 0 to 7.")
    progress: bool = _flag(True, "Show a progress bar.")

    def __post_init__(self):
        wanted = {
            "checkpoint": (bool(self.checkpoint), "a directory"),
            "input": (bool(self.input), "a file"),
            "output": (bool(self.output), "a file"),
            "seed": (0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            "profile": (self.profile in prompt_lib.PROFILES, " or ".join(prompt_lib.PROFILES)),
            "dtype": (self.dtype in command.DTYPES, " or ".join(command.DTYPES)),
            "max_length": (self.max_length >= 0, "0 (the model's own) or more"),
            "max_rows": (self.max_rows >= 1, "1 or more"),
        }
        command.check_fields(self, wanted)
        quantize.check_recipe(self.weights)
        _ = self.options

    @property
    def options(self) -> options_lib.Options:
        values = jsonl.parse_line("--defaults", self.defaults)
        if not isinstance(values, dict):
            raise ValueError(f"--defaults: got {self.defaults}; wanted a JSON object")
        try:
            return jsonl.options_from_fields(options_lib.Options(), values)
        except ValueError as error:
            raise ValueError(f"--defaults: {error}") from None


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """A request of the input. head: what its output begins with."""

    index: int
    output_fields: dict[str, Any]
    prompt: tuple[int, ...]
    options: options_lib.Options


@dataclasses.dataclass(frozen=True)
class BatchSummary:
    """Requests: of the input, done before, done now. Tokens, errors: of those done now."""

    requests: int
    done_before: int
    done: int
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    stopped_by: int | None = None

    def __str__(self):
        return (
            f"{self.done_before + self.done} of {self.requests} requests, {self.done} of them now: "
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached), "
            f"{self.completion_tokens} made"
            + (f"; {self.errors} ended in errors" if self.errors else "")
        )


def run(config: BatchConfig, stop: Callable[[], int | None] = lambda: None) -> BatchSummary:
    """Do all requests of the input that the output does not have.

    Args:
      config: what to do.
      stop: asked between dispatches; a signal's number ends the run with what is done.

    Raises:
      ValueError, OSError: an input, checkpoint or unfinished output that cannot be used, found
        before anything runs.
    """
    folder = command.checkpoint_dir(config.checkpoint)
    tokenizer = tokenizer_lib.Tokenizer.load(folder)
    model_config = m1_jax.ModelConfig.from_file(folder / "config.json")
    requests = read_requests(config, tokenizer, model_config)
    output = pathlib.Path(config.output)
    done = _begin_output(output, _fingerprint_run(config, folder), len(requests))
    todo = [line for line in requests if line.index not in done]
    if not todo:
        return BatchSummary(len(requests), len(done), 0)
    sizes = config_lib.fit_config(  # of all, so that a compilation cache has the same programs
        [(len(line.prompt), line.options.max_tokens) for line in requests],
        config.max_rows,
        model_config.max_position_embeddings,
        num_pages=config.num_pages,
        num_snapshots=config.num_snapshots,
        draft_tokens=config.draft_tokens,
    )
    model = command.load_model(config.checkpoint, config.dtype, config.weights)
    served = engine.Engine(model, tokenizer, sizes)
    bar = tqdm.tqdm(
        total=len(requests), initial=len(done), unit="request", disable=not config.progress
    )
    with bar, output.open("ab") as file:
        return _serve_requests(config, served, todo, len(done), file, bar, stop)


def _serve_requests(config, served, todo, before, file, bar, stop) -> BatchSummary:
    """Run requests, writing each as it ends; a window of them is known to the engine."""
    waiting = collections.deque(todo)
    live: dict[int, tuple[BatchRequest, request_lib.Request]] = {}
    window = min(3 * served.config.max_rows, served.config.max_queue)
    counts, signal_number, going = collections.Counter(), None, True
    while going and signal_number is None:
        while waiting and len(live) < window:
            line = waiting.popleft()
            live[line.index] = line, served.submit(line.prompt, line.options)
        going = served.step() or bool(waiting)
        for index in [i for i, (_, one) in live.items() if one.done.is_set()]:
            line, request = live.pop(index)
            made = request.output()
            _append_output(file, line, made, config.tokens)
            bar.update()
            counts["done"] += 1
            counts["errors"] += made.finish_reason == "error"
            for name in ("prompt_tokens", "cached_tokens"):
                counts[name] += getattr(made, name)
            counts["completion_tokens"] += len(made.tokens)
        bar.set_postfix(tokens=counts["completion_tokens"], refresh=False)
        signal_number = stop()
    os.fsync(file.fileno())
    served.close()
    total = before + counts["done"] + len(waiting) + len(live)
    return BatchSummary(total, before, **counts, stopped_by=signal_number)


def _append_output(file, line: BatchRequest, made: request_lib.RequestOutput, tokens: bool) -> None:
    """Write a line in one call, so that a kill tears the last one at most."""
    record = {
        **line.output_fields,
        "text": made.text,
        "finish_reason": made.finish_reason,
        "prompt_tokens": made.prompt_tokens,
        "completion_tokens": len(made.tokens),
        "reasoning_tokens": made.reasoning_tokens,
    }
    if tokens:
        record["tokens"] = jsonl.tokens_to_json(made.tokens)
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()


# ---- the input


def read_requests(
    config: BatchConfig, tokenizer: tokenizer_lib.Tokenizer, model_config: Any
) -> list[BatchRequest]:
    """Return all requests of the input.

    Raises:
      ValueError: bad lines, up to ten of them.
    """
    path = pathlib.Path(config.input)
    found = jsonl.read_lines(path)
    if not found:
        raise ValueError(f"{path}: got no requests; wanted one per line")
    reader = _RequestReader(config, tokenizer, model_config)
    made, bad = [], []
    for index, (where, text) in enumerate(found):
        try:
            made.append(reader.parse_request(index, where, text))
        except ValueError as error:
            told = str(error).replace("\n", " ")
            bad.append(told if told.startswith(where) else f"{where}: {told}")
    if bad:
        more = (
            [f"and {len(bad) - _MAX_LISTED_BAD_LINES} more"]
            if len(bad) > _MAX_LISTED_BAD_LINES
            else []
        )
        told = "\n  ".join([*bad[:_MAX_LISTED_BAD_LINES], *more])
        raise ValueError(f"got {len(bad)} bad lines of {len(found)}; nothing was run:\n  {told}")
    return made


class _RequestReader:
    """Turns lines into requests, and remembers what they may not repeat or need not again."""

    def __init__(self, config: BatchConfig, tokenizer: tokenizer_lib.Tokenizer, model_config: Any):
        self._config, self._tokenizer, self._model_config = config, tokenizer, model_config
        self._defaults = config.options
        self._names = [field.name for field in dataclasses.fields(options_lib.Options)]
        self._ids: dict[str, str] = {}
        self._compiler: grammar.GrammarCompiler | None = None
        self._constraints: set[str] = set()

    def parse_request(self, index: int, where: str, text: str) -> BatchRequest:
        value = jsonl.parse_line(where, text)
        if not isinstance(value, dict):
            raise ValueError(f"got {value!r:.80}; wanted an object")
        options_lib.check_names("field", value, (*_LINE_FIELDS, *self._names))
        asked = {k: v for k, v in value.items() if k in jsonl.REQUEST_FIELDS}
        config = self._config
        asked = jsonl.check_conversation(where, asked, config.system, config.raw)
        prompt = jsonl.encode_request(where, self._tokenizer, asked, config.profile)
        own = {k: v for k, v in value.items() if k == "preset" or k in self._names}
        options = jsonl.options_from_fields(self._defaults, own)
        if "seed" not in own:
            options = dataclasses.replace(options, seed=jsonl.derive_seed(config.seed, index))
        limits = (self._model_config, config.max_length)
        jsonl.check_prompt_length(where, prompt, options.max_tokens, *limits)
        self._check_options(options)
        return BatchRequest(
            index, self._make_output_fields(index, where, value), tuple(prompt), options
        )

    def _make_output_fields(self, index: int, where: str, value: dict[str, Any]) -> dict[str, Any]:
        if "id" not in value:
            return {"index": index}
        name = value["id"]
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ValueError(f"id: got {name!r:.80}; wanted text or a whole number")
        first = self._ids.setdefault(repr(name), where)
        if first != where:
            raise ValueError(f"id: got {name!r:.80} again, first at {first}; wanted another one")
        return {"index": index, "id": name}

    def _check_options(self, options: options_lib.Options) -> None:
        """Raise now what `Engine.submit` would raise later."""
        vocab_size = self._model_config.vocab_size
        options_lib.check_options(options, vocab_size, self._tokenizer.stop_ids)
        stopping.OutputProgress(options, self._tokenizer)
        name = options.constraint
        if name is None:
            return
        key = json.dumps([name, getattr(options, name)], sort_keys=True)
        if key not in self._constraints:
            if self._compiler is None:
                self._compiler = grammar.GrammarCompiler(self._tokenizer, vocab_size)
            self._compiler.compile_matcher(options)
            self._constraints.add(key)


# ---- the output


def _fingerprint_run(config: BatchConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Return all that the outputs depend on; weights are told apart by the sizes of their files."""
    names = ("defaults", "seed", "tokens", "system", "raw", "profile", "dtype", "weights")
    sizes = config_lib.EngineConfig()  # decide the last bits, as JAX and the hardware do
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    small = [folder / name for name in ("config.json", "tokenizer.json", "release.json")]
    texts = [path.read_bytes() for path in small if path.is_file()]
    return {
        "input": hashlib.sha256(pathlib.Path(config.input).read_bytes()).hexdigest(),
        "checkpoint": str(folder.resolve()),
        "files": hashlib.sha256(repr((listed, texts)).encode()).hexdigest(),
        **{name: getattr(config, name) for name in names},
        "defaults": jsonl.parse_line("--defaults", config.defaults),
        "recipe": [sizes.chunk_tokens, sizes.attention_tile, sizes.matmul_tile],
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }


def _begin_output(output: pathlib.Path, fingerprint: dict[str, Any], count: int) -> set[int]:
    """Begin an output, or take one up: drop its torn last line; return the indices it has.

    Raises:
      ValueError: it was begun with another input or other options, or is no such file.
    """
    beside = output.with_name(output.name + ".run.json")
    if not output.exists():
        part = beside.with_name(beside.name + ".part")
        part.write_text(json.dumps(fingerprint, indent=1) + "\n")
        part.replace(beside)
        output.touch()
        return set()
    if not beside.exists():
        raise ValueError(f"--output: {output} exists, and {beside.name} not; wanted a new file")
    old = jsonl.parse_line(str(beside), beside.read_text())
    changed = [name for name in fingerprint if old.get(name) != fingerprint[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"--output: {output} was begun with another {' and '.join(changed)} ({name}: got "
            f"{fingerprint[name]!r:.80}; wanted {old.get(name)!r:.80}). Give the same again, or "
            "another --output."
        )
    return _read_done_indices(output, count)


def _read_done_indices(output: pathlib.Path, count: int) -> set[int]:
    """Return the indices of whole lines, and cut off what follows the last of them."""
    done, end = set(), 0
    with output.open("r+b") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            value = jsonl.parse_line(f"{output}:{number}", line.decode())
            index = value.get("index") if isinstance(value, dict) else None
            if not isinstance(index, int) or not 0 <= index < count or index in done:
                raise ValueError(
                    f"{output}:{number}: got index {index!r}; wanted each of 0 to {count - 1} "
                    "once at most. Delete the line, or give another --output."
                )
            done.add(index)
        file.truncate(end)
    return done


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step at INFO
    caught: list[int] = []

    def catch(number, _):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    try:
        summary = run(command.config_from_flags(BatchConfig), lambda: caught[0] if caught else None)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summary, file=sys.stderr)
    if summary.stopped_by is not None:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + summary.stopped_by)


def cli() -> None:
    command.define_flags(BatchConfig)
    app.run(main)


if __name__ == "__main__":
    cli()

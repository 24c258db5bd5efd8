"""Command: answer many requests from a file. A run that was killed goes on when started again.

    python -m infer.offline --checkpoint=DIR --input=requests.jsonl --output=outputs.jsonl

A line of the input is {"prompt": ..., "system": ...} or {"messages": [...], "tools": [...]}. It may
have an "id", a "preset" and any field of `options.Options`: {"prompt": "Hi", "max_tokens": 9}. All
lines are checked before the first one runs. A line of the output is written when its request is
done, so lines are in no certain order. Its "index" counts the input's lines that are not blank,
from 0:

    {"index": 0, "id": ..., "text": ..., "finish_reason": "stop", "prompt_tokens": 12,
     "completion_tokens": 40, "reasoning_tokens": 0}

With --tokens a line also has "tokens" with their log-probabilities. OUTPUT.run.json beside the
output records what the run depends on. The same command, started again, answers the requests that
are missing. A line is the same byte for byte wherever the run was interrupted: a request without a
seed gets one that is derived from the run's seed and its index.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import tqdm
from absl import app, flags, logging

import m1_jax
from infer import batch_output, command, engine, grammar, jsonl, stopping
from infer import config as config_lib
from infer import options as options_lib
from infer import prompt as prompt_lib
from infer import request as request_lib
from m1_jax import command_help, durable, quantize
from m1_jax import tokenizer as tokenizer_lib

_flag = command.flag_field
_MAX_LISTED_BAD_LINES = 10  # one error lists so many
_LINE_FIELDS = (*jsonl.REQUEST_FIELDS, "id", "preset")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """One run. Each field is a flag of the command."""

    checkpoint: str = _flag("", "Release directory, or one made by m1_jax.convert.")
    input: str = _flag("", "JSONL file of requests.")
    output: str = _flag("", "JSONL file to write, or to go on with after a kill.")
    defaults: str = _flag("{}", 'Options for lines without their own: {"max_tokens": 100, ...}.')
    seed: int = _flag(0, "Seed of the run; a line without a seed gets one from it.")
    tokens: bool = _flag(False, "Write each token with its log-probabilities.")
    system: str | None = _flag(None, "System message for prompts without their own.")
    raw: bool = _flag(False, "Read prompts as they are, control tokens included: no template.")
    profile: str = _flag("release", "Chat template: release or vllm.")
    dtype: str = _flag("float32", "Dtype of the computation: float32 or bfloat16.")
    weights: str | None = _flag(None, "int8-experts or int8-all quantizes weights; default: dtype.")
    max_length: int = _flag(0, "Most tokens of prompt and output together; 0: the model's limit.")
    max_rows: int = _flag(8, "Most sequences in a batch.")
    num_pages: int = _flag(0, "Pages of KV cache, 64 tokens each; 0: as many as needed.")
    num_snapshots: int = _flag(8, "States kept for prompts that begin alike.")
    draft_tokens: int = _flag(0, "Tokens to draft by prompt lookup, 0 to 7; 0 is off.")
    progress: bool = _flag(True, "Show a progress bar.")

    def __post_init__(self):
        checks = {
            "checkpoint": (bool(self.checkpoint), "a directory"),
            "input": (bool(self.input), "a file"),
            "output": (bool(self.output), "a file"),
            "seed": (0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            "profile": (self.profile in prompt_lib.PROFILES, " or ".join(prompt_lib.PROFILES)),
            "dtype": (self.dtype in command.DTYPES, " or ".join(command.DTYPES)),
            "max_length": (self.max_length >= 0, "0 (the model's own) or more"),
            "max_rows": (self.max_rows >= 1, "1 or more"),
        }
        command.check_fields(self, checks)
        quantize.check_recipe(self.weights)
        _ = self.options  # raises for defaults that are no options

    @property
    def options(self) -> options_lib.Options:
        """Return the options of lines that have none of their own.

        Raises:
          ValueError: --defaults is not an object of options.
        """
        values = jsonl.parse_line("--defaults", self.defaults)
        if not isinstance(values, dict):
            raise ValueError(f"--defaults: got {self.defaults}; wanted a JSON object")
        try:
            return jsonl.options_from_fields(options_lib.Options(), values)
        except ValueError as error:
            raise ValueError(f"--defaults: {error}") from None


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """A request of the input."""

    index: int  # among the lines that are not blank, from 0
    output_fields: dict[str, Any]  # what the output's line begins with: index and id
    prompt: tuple[int, ...]  # token ids
    options: options_lib.Options  # the request's options, with a seed of its own


@dataclasses.dataclass(frozen=True)
class BatchSummary:
    """What one run did."""

    requests: int  # requests of the input
    num_done_before: int  # requests that earlier runs had done
    num_done: int = 0  # requests that this run did, of which the counts below are
    errors: int = 0  # requests that ended with finish_reason "error"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that were found in the prefix cache
    completion_tokens: int = 0
    stopped_by: int | None = None  # the signal that ended the run, if one did

    def __str__(self):
        return (
            f"{self.num_done_before + self.num_done} of {self.requests} requests, "
            f"{self.num_done} of them now: "
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached), "
            f"{self.completion_tokens} made"
            + (f"; {self.errors} ended in errors" if self.errors else "")
        )


def run(config: BatchConfig, stop: Callable[[], int | None] = lambda: None) -> BatchSummary:
    """Answer all requests of the input that the output does not have.

    Args:
      config: the flags.
      stop: called between two steps of the engine. A signal's number ends the run, and what is
        done stays in the output.

    Raises:
      ValueError, OSError: an input, checkpoint or unfinished output that cannot be used, found
        before anything runs.
    """
    folder = command.checkpoint_dir(config.checkpoint)
    tokenizer = tokenizer_lib.Tokenizer.load(folder)
    model_config = m1_jax.ModelConfig.from_file(folder / "config.json")
    requests = read_requests(config, tokenizer, model_config)
    output = pathlib.Path(config.output)
    fingerprint = _fingerprint_run(config, folder)
    done_indices = batch_output.begin_output(output, fingerprint, len(requests))
    todo = [request for request in requests if request.index not in done_indices]
    if not todo:
        return BatchSummary(len(requests), len(done_indices), 0)
    # Sizes for all requests, not for those still to do: a run that goes on has the same programs,
    # which a compilation cache then holds.
    sizes = config_lib.fit_config(
        [(len(request.prompt), request.options.max_tokens) for request in requests],
        config.max_rows,
        model_config.max_position_embeddings,
        num_pages=config.num_pages,
        num_snapshots=config.num_snapshots,
        draft_tokens=config.draft_tokens,
    )
    model = command.load_model(config.checkpoint, config.dtype, config.weights)
    running_engine = engine.Engine(model, tokenizer, sizes)
    bar = tqdm.tqdm(
        total=len(requests),
        initial=len(done_indices),
        unit="request",
        disable=not config.progress,
    )
    with bar, output.open("ab") as file:
        return _serve_requests(config, running_engine, todo, len(done_indices), file, bar, stop)


def _serve_requests(
    config: BatchConfig,
    running_engine: engine.Engine,
    todo: list[BatchRequest],
    num_done_before: int,
    file: BinaryIO,
    bar: tqdm.tqdm,
    stop: Callable[[], int | None],
) -> BatchSummary:
    """Run requests, and write each when it ends."""
    waiting = collections.deque(todo)
    live: dict[int, tuple[BatchRequest, request_lib.Request]] = {}  # requests by index
    # The engine knows a window of requests: enough to keep its rows busy, however many there are.
    window = min(3 * running_engine.config.max_rows, running_engine.config.max_queue)
    counts, signal_number, going = collections.Counter(), None, True
    while going and signal_number is None:
        while waiting and len(live) < window:
            batch_request = waiting.popleft()
            live[batch_request.index] = (
                batch_request,
                running_engine.submit(batch_request.prompt, batch_request.options),
            )
        going = running_engine.step() or bool(waiting)
        for index in [i for i, (_, request) in live.items() if request.done.is_set()]:
            batch_request, request = live.pop(index)
            output = request.output()
            batch_output.append_output(file, batch_request.output_fields, output, config.tokens)
            bar.update()
            counts["num_done"] += 1
            counts["errors"] += output.finish_reason == "error"
            for name in ("prompt_tokens", "cached_tokens"):
                counts[name] += getattr(output, name)
            counts["completion_tokens"] += len(output.tokens)
        bar.set_postfix(tokens=counts["completion_tokens"], refresh=False)
        signal_number = stop()
    durable.flush_to_disk(file)
    running_engine.close()
    total = num_done_before + counts["num_done"] + len(waiting) + len(live)
    return BatchSummary(total, num_done_before, **counts, stopped_by=signal_number)


# ---- the input


def read_requests(
    config: BatchConfig, tokenizer: tokenizer_lib.Tokenizer, model_config: m1_jax.ModelConfig
) -> list[BatchRequest]:
    """Return all requests of the input.

    Raises:
      ValueError: bad lines, of which the error lists up to `_MAX_LISTED_BAD_LINES`.
    """
    path = pathlib.Path(config.input)
    lines = jsonl.read_lines(path)
    if not lines:
        raise ValueError(f"{path}: got no requests; wanted one per line")
    reader = _RequestReader(config, tokenizer, model_config)
    requests, errors = [], []
    for index, (location, text) in enumerate(lines):
        try:
            requests.append(reader.parse_request(index, location, text))
        except ValueError as error:
            message = str(error).replace("\n", " ")
            # Some errors name the line themselves.
            errors.append(message if message.startswith(location) else f"{location}: {message}")
    if errors:
        num_unlisted = len(errors) - _MAX_LISTED_BAD_LINES
        unlisted = [f"and {num_unlisted} more"] if num_unlisted > 0 else []
        listed = "\n  ".join([*errors[:_MAX_LISTED_BAD_LINES], *unlisted])
        raise ValueError(
            f"got {len(errors)} bad lines of {len(lines)}; nothing was run:\n  {listed}"
        )
    return requests


class _RequestReader:
    """Turns lines into requests.

    It remembers ids, which may not be repeated, and constraints, which it compiles once.
    """

    def __init__(
        self,
        config: BatchConfig,
        tokenizer: tokenizer_lib.Tokenizer,
        model_config: m1_jax.ModelConfig,
    ):
        self._config, self._tokenizer, self._model_config = config, tokenizer, model_config
        self._defaults = config.options
        self._names = [field.name for field in dataclasses.fields(options_lib.Options)]
        self._ids: dict[str, str] = {}  # location of each id's first line
        self._compiler: grammar.GrammarCompiler | None = None
        self._constraints: set[str] = set()  # constraints that were compiled, as JSON

    def parse_request(self, index: int, location: str, text: str) -> BatchRequest:
        """Return the request of one line.

        Raises:
          ValueError: a line that cannot be served.
        """
        value = jsonl.parse_line(location, text)
        if not isinstance(value, dict):
            raise ValueError(f"got {value!r:.80}; wanted an object")
        options_lib.check_names("field", value, (*_LINE_FIELDS, *self._names))
        conversation = {k: v for k, v in value.items() if k in jsonl.REQUEST_FIELDS}
        config = self._config
        conversation = jsonl.check_conversation(location, conversation, config.system, config.raw)
        prompt = jsonl.encode_request(location, self._tokenizer, conversation, config.profile)
        own_options = {k: v for k, v in value.items() if k == "preset" or k in self._names}
        options = jsonl.options_from_fields(self._defaults, own_options)
        if "seed" not in own_options:
            options = dataclasses.replace(options, seed=jsonl.derive_seed(config.seed, index))
        limits = (self._model_config, config.max_length)
        jsonl.check_prompt_length(location, prompt, options.max_tokens, *limits)
        self._check_options(options)
        return BatchRequest(
            index, self._make_output_fields(index, location, value), tuple(prompt), options
        )

    def _make_output_fields(
        self, index: int, location: str, value: dict[str, Any]
    ) -> dict[str, Any]:
        if "id" not in value:
            return {"index": index}
        name = value["id"]
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ValueError(f"id: got {name!r:.80}; wanted text or a whole number")
        # By repr: 1 and "1" are different ids.
        first = self._ids.setdefault(repr(name), location)
        if first != location:
            raise ValueError(f"id: got {name!r:.80} again, first at {first}; wanted another one")
        return {"index": index, "id": name}

    def _check_options(self, options: options_lib.Options) -> None:
        """Raise now what `Engine.submit` would raise later, when other requests have run."""
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


def _fingerprint_run(config: BatchConfig, folder: pathlib.Path) -> dict[str, Any]:
    """Return all that the outputs depend on.

    Files of weights are too large to hash here: their names and sizes stand for them.
    """
    names = ("defaults", "seed", "tokens", "system", "raw", "profile", "dtype", "weights")
    # The tiles decide the order of sums, so the last bits, as do JAX's version and the hardware.
    sizes = config_lib.EngineConfig()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    small_files = [folder / name for name in ("config.json", "tokenizer.json", "release.json")]
    texts = [path.read_bytes() for path in small_files if path.is_file()]
    return {
        "input": hashlib.sha256(pathlib.Path(config.input).read_bytes()).hexdigest(),
        "checkpoint": str(folder.resolve()),
        "files": hashlib.sha256(repr((listing, texts)).encode()).hexdigest(),
        **{name: getattr(config, name) for name in names},
        "defaults": jsonl.parse_line("--defaults", config.defaults),
        "recipe": [sizes.chunk_tokens, sizes.attention_tile, sizes.matmul_tile],
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step at INFO
    signals: list[int] = []

    def on_signal(signal_number, _):
        signal.signal(signal_number, signal.SIG_DFL)  # a second signal ends the process at once
        signals.append(signal_number)

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, on_signal)
    try:
        summary = run(
            command.config_from_flags(BatchConfig), lambda: signals[0] if signals else None
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(summary, file=sys.stderr)
    if summary.stopped_by is not None:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + summary.stopped_by)  # as a shell reports a signal


def cli() -> None:
    command.define_flags(BatchConfig)
    command_help.prepare_help(__doc__, command.__name__)
    app.run(main)


if __name__ == "__main__":
    cli()

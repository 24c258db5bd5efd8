"""Command: write text with a checkpoint.

    python -m infer.generate --checkpoint=DIR --prompt="Why is the sky blue?"
    python -m infer.generate --checkpoint=DIR --prompts_file=FILE --max_tokens=64 --temperature=0
    python -m infer.generate --checkpoint=DIR --prompt=Hi --mesh=expert=8,tensor=8 --distributed

DIR is a release directory or one made by `m1_jax.convert`, with its tokenizer. FILE has a prompt
per line, or, named .jsonl, .ndjson or .json, an object per line: {"prompt": ..., "system": ...} or
{"messages": [...], "tools": [...]}. Text goes to stdout as it comes, speed to stderr at the end.
For many requests, each with options of its own, there is `infer.offline`.

On a mesh each device holds its part of the weights alone. With --distributed the same command runs
on every host: process 0 reads and writes, and the others compute with it.

The text of a prompt depends on the options, the prompt's index and the seed alone. Its own seed is
`jsonl.derive_seed(seed, index)`, and the engine's results do not depend on what runs beside it.
"""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

import m1_jax
from infer import command, engine, jsonl, request_check, text_printer
from infer import config as config_lib
from infer import options as options_lib
from infer import prompt as prompt_lib
from infer import request as request_lib
from infer.execution import leader_follower
from m1_jax import command_help, command_mesh, distributed, multihost, quantize
from m1_jax import tokenizer as tokenizer_lib

_flag = command.flag_field
# Fields of `GenerateConfig` by their title in --help.
FLAG_GROUPS = {
    "Model and devices": ("checkpoint", "dtype", "weights", "mesh", "lightning", "distributed"),
    "Prompts": ("prompt", "prompts_file", "system", "raw", "profile"),
    "Length of the output": (
        *("max_tokens", "min_tokens", "max_length", "stop", "ignore_eos", "thinking_tokens"),
    ),
    "Sampling": (
        *("preset", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    ),
    "Form of the output": ("json_schema", "regex", "grammar", "after_thinking"),
    "Running and printing": ("batch_size", "stream", "logprobs", "top_logprobs"),
}
_OPTIONS = [field.name for field in dataclasses.fields(options_lib.Options)]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """One run. Each field is a flag of the command.

    An option that is None has the preset's value, or without a preset the default of
    `options.Options`.
    """

    checkpoint: str = _flag("", "Release directory, or one made by m1-convert.", required=True)
    prompt: str | None = _flag(None, "Text of the user's message.")
    system: str | None = _flag(None, "System message for prompts without their own.")
    prompts_file: str | None = _flag(None, "File with a prompt per line, or a .jsonl of objects.")
    preset: str | None = _flag(None, f"Options: {', '.join(options_lib.PRESETS)}.")
    max_tokens: int | None = _flag(None, "Most tokens of the output. Default: 512, or preset's.")
    min_tokens: int | None = _flag(None, "Least tokens of the output. Default: 0.")
    temperature: float | None = _flag(None, "0 takes the likeliest token. Default: 1.")
    top_p: float | None = _flag(None, "Keep the likeliest tokens of this mass. Default: 0.95.")
    top_k: int | None = _flag(None, "Keep this many likeliest tokens; 0 is off. Default: 0.")
    min_p: float | None = _flag(None, "Least share of the likeliest's mass. Default: 0, off.")
    repetition_penalty: float | None = _flag(None, "Penalty, prompt included. Default: 1, off.")
    presence_penalty: float | None = _flag(None, "Penalty, output alone. Default: 0, off.")
    frequency_penalty: float | None = _flag(None, "Penalty by count. Default: 0, off.")
    seed: int = _flag(0, "The same seed and prompt index draw the same text.")
    stop: tuple[str, ...] = _flag((), "Text that ends the output, and is left out; repeatable.")
    thinking_tokens: int | None = _flag(None, "End thinking after so many tokens. Default: never.")
    json_schema: str | None = _flag(None, "JSON schema that the output matches, or @FILE.")
    regex: str | None = _flag(None, "Regular expression that the output matches.")
    grammar: str | None = _flag(None, "Lark grammar that the output matches, or @FILE.")
    after_thinking: bool = _flag(False, "Constrain only what follows the model's thinking.")
    logprobs: str | None = _flag(None, "File for tokens with log-probabilities, one line a prompt.")
    top_logprobs: int | None = _flag(None, "Likeliest tokens a position, 0 to 20. Default: 0.")
    dtype: str | None = _flag(None, command_mesh.DTYPE_HELP)
    weights: str | None = _flag(None, "int8-experts or int8-all. Default: as --dtype.")
    mesh: str | None = _flag(None, command_mesh.MESH_HELP)
    lightning: str | None = _flag(None, command_mesh.LIGHTNING_HELP)
    distributed: bool = _flag(False, distributed.DISTRIBUTED_HELP)
    max_length: int = _flag(0, "Most tokens of prompt and output together; 0: the model's limit.")
    batch_size: int = _flag(8, "Most prompts in a batch.")
    raw: bool = _flag(False, "Read prompts as they are, control tokens included: no template.")
    stream: bool = _flag(True, "Print text as it comes.")
    ignore_eos: bool = _flag(False, "Always write max_tokens tokens.")
    profile: str = _flag("release", "Chat template: release or vllm.")

    def __post_init__(self):
        checks = {
            "checkpoint": (bool(self.checkpoint), "a directory"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "1 or more"),
            "max_length": (self.max_length >= 0, "0 (the model's own) or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "seed": (0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            "profile": (self.profile in prompt_lib.PROFILES, " or ".join(prompt_lib.PROFILES)),
        }
        command.check_fields(self, checks)
        command.check_paths(self, ("checkpoint", "prompts_file", "logprobs"))
        quantize.check_recipe(self.weights)
        command_mesh.check_model_flags(self.dtype, self.mesh, self.lightning)
        _ = self.options  # raises for values out of range
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("--prompt, --prompts_file: got both or neither; wanted one of them")
        if self.raw and self.system is not None:
            raise ValueError(
                "--system: got one with --raw, which has no place for it; leave it out"
            )
        if self.top_logprobs and self.logprobs is None:
            raise ValueError("--top_logprobs: got it without --logprobs; name a file for them")

    @property
    def model_choice(self) -> command.ModelChoice:
        return command.ModelChoice(
            self.checkpoint, self.dtype, self.weights, self.mesh, self.lightning
        )

    @property
    def options(self) -> options_lib.Options:
        """Return the options of all prompts.

        Raises:
          ValueError: what `options.Options` refuses.
          OSError: a file that cannot be read.
        """
        values = {name: getattr(self, name) for name in _OPTIONS if hasattr(self, name)}
        # Flags that are not set are None, False or (): they must not replace a preset's values.
        values = {k: v for k, v in values.items() if v is not None and v is not False and v != ()}
        for name in ("json_schema", "grammar"):
            if values.get(name, "").startswith("@"):
                values[name] = jsonl.read_text(command.local_path(name, values[name][1:]))
        if self.preset is None:
            options = options_lib.Options(**values)
        else:
            options = options_lib.preset_options(self.preset, **values)
        return options


@dataclasses.dataclass
class GenerateStats:
    """Tokens and seconds of one run."""

    prefill_tokens: int = 0  # tokens of all prompts
    prefill_secs: float = 0.0  # time of the engine's steps that released first tokens alone
    decode_tokens: int = 0  # tokens of all outputs, but for the first of each
    decode_secs: float = 0.0  # time of all other steps
    compile_secs: float = 0.0  # time of the engine's construction, before any step

    def __str__(self):
        def rate(tokens, secs):
            return f"{tokens} tokens in {secs:.2f} s ({tokens / max(secs, 1e-9):.1f} tokens/s)"

        return (
            f"prefill: {rate(self.prefill_tokens, self.prefill_secs)}; "
            f"decode: {rate(self.decode_tokens, self.decode_secs)}; "
            f"compile: {self.compile_secs:.1f} s"
        )


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """What generating needs.

    Attributes:
      model: the model, on this process's devices.
      sizes: sizes of the engine.
      tokenizer: the checkpoint's. None on processes but the first, which only compute.
      prompts: token ids of each prompt. Empty on processes but the first.
    """

    model: m1_jax.MiniMaxM1
    sizes: config_lib.EngineConfig
    tokenizer: tokenizer_lib.Tokenizer | None
    prompts: list[list[int]]


def run(
    config: GenerateConfig, out: text_printer.TextStream | None = None
) -> tuple[list[request_lib.RequestOutput], GenerateStats]:
    """Generate for every prompt of `config`, printing text to `out` (stdout) as it comes.

    With several processes, all of them call this, and process 0 alone has the results.

    Raises:
      ValueError, OSError: an input that cannot be used, found before any generating starts.
    """
    return generate_texts(config, prepare_run(config), out or sys.stdout)


def generate_texts(
    config: GenerateConfig,
    prepared: PreparedRun,
    out: text_printer.TextStream,
    stop: Callable[[], int | None] = lambda: None,
) -> tuple[list[request_lib.RequestOutput], GenerateStats]:
    """Do what `run` does, with the result of `prepare_run`.

    Args:
      stop: called between two steps of the engine. A signal's number ends the run.
    """
    if prepared.tokenizer is None:
        leader_follower.follow_engine(prepared.model, prepared.sizes)
        return [], GenerateStats()
    prompts = prepared.prompts
    options, stats, began = config.options, GenerateStats(), time.perf_counter()
    running_engine = engine.Engine(prepared.model, prepared.tokenizer, prepared.sizes)
    step_end = time.perf_counter()
    stats.compile_secs = step_end - began
    printer = text_printer.TextPrinter(len(prompts), config.stream, out)
    # A list, so that the closure can count in it: tokens of this step, but for first ones.
    decoded = [0]
    unfinished = set(range(len(prompts)))  # indices of prompts whose last text is not printed

    def on_token(request, token, text):
        # Prompts are submitted in order, so a request's `sequence_id` is its prompt's index. Its
        # first token comes out of its prefill.
        decoded[0] += token is not None and len(request.tokens) > 1
        printer.push(request.sequence_id, text, request.finish_reason is not None)
        if request.finish_reason is not None:
            unfinished.discard(request.sequence_id)

    requests = []
    for index, ids in enumerate(prompts):
        seeded = dataclasses.replace(options, seed=jsonl.derive_seed(config.seed, index))
        requests.append(running_engine.submit(ids, seeded, on_token))
    going = True
    while going and stop() is None:
        step_began, decoded[0] = step_end, 0
        going = running_engine.step()
        step_end = time.perf_counter()
        stats.decode_tokens += decoded[0]
        # A step may prefill and decode at once. One that decodes counts as decoding.
        if decoded[0]:
            stats.decode_secs += step_end - step_began
        else:
            stats.prefill_secs += step_end - step_began
    running_engine.close()
    outputs = [request.output() for request in requests]
    stats.prefill_tokens = sum(output.prompt_tokens for output in outputs)
    for index in sorted(unfinished):  # ended without a token
        printer.push(index, "", last=True)
    if config.logprobs is not None:
        records = [{"index": i, **output_record(output)} for i, output in enumerate(outputs)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        command.local_path("logprobs", config.logprobs).write_text(text)
    return outputs, stats


def output_record(output: request_lib.RequestOutput) -> dict[str, Any]:
    """Return an output's tokens and its end as JSON, for --logprobs."""
    return {"finish_reason": output.finish_reason, "tokens": jsonl.tokens_to_json(output.tokens)}


def prepare_run(config: GenerateConfig) -> PreparedRun:
    """Return the model, and on process 0 the tokenizer and the prompts' token ids.

    The model, which takes longest, is loaded after all checks. All processes call this.

    Raises:
      ValueError, OSError: an input that cannot be used, or a model that cannot fit.
    """
    inputs = distributed.run_on_first(lambda: read_inputs(config))
    tokenizer, prompts, sizes = (None, [], None) if inputs is None else inputs
    plan = config.model_choice.plan_engine(sizes)
    model = config.model_choice.load(plan.layout)
    return PreparedRun(model, plan.sizes, tokenizer, prompts)


def fit_engine(
    config: GenerateConfig, prompts: list[list[int]], model_config: m1_jax.ModelConfig
) -> config_lib.EngineConfig:
    """Return the sizes of an engine for these prompts."""
    return config_lib.fit_config(
        [(len(ids), config.options.max_tokens) for ids in prompts],
        config.batch_size,
        model_config.max_position_embeddings,
        max_queue=len(prompts),
        num_snapshots=min(8, len(prompts) - 1),  # a single prompt shares its prefix with no other
    )


def read_inputs(
    config: GenerateConfig,
) -> tuple[tokenizer_lib.Tokenizer, list[list[int]], config_lib.EngineConfig]:
    """Return the tokenizer, the prompts' token ids and the engine's sizes, after all checks."""
    folder, options = command.checkpoint_dir(config.checkpoint), config.options
    requests = read_conversations(config)
    if config.logprobs is not None:
        command.output_path("logprobs", config.logprobs, [config.prompts_file])
    tokenizer = tokenizer_lib.Tokenizer.load(folder)
    model_config = m1_jax.ModelConfig.from_file(folder / "config.json")
    prompts = []
    for location, request in requests:
        with jsonl.locate_errors(location):
            ids = jsonl.encode_request(tokenizer, request, config.profile)
            limits = (options.max_tokens, model_config, config.max_length)
            jsonl.check_prompt_length(ids, *limits)
            # This and the next check raise now what the engine would after the model is loaded.
            prompts.append(list(request_check.plain_token_ids(ids, model_config.vocab_size)))
    request_check.OptionsChecker(tokenizer, model_config.vocab_size).check(options)
    return tokenizer, prompts, fit_engine(config, prompts, model_config)


def read_conversations(config: GenerateConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return location and {"prompt": ...} (raw) or {"messages": ..., "tools": ...} of all prompts.

    Raises:
      ValueError, OSError: a file that cannot be read, or a request of another form.
    """
    form = (config.system, config.raw)
    if config.prompts_file is not None:
        path = command.local_path("prompts_file", config.prompts_file)
        return jsonl.read_conversations(path, *form)
    with jsonl.locate_errors("--prompt"):
        return [("--prompt", jsonl.check_conversation({"prompt": config.prompt}, *form))]


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every step at INFO
    distributed.run_to_exit(_run_command)


def _run_command() -> int:
    """Run with the flags, and return the exit status, which all processes share."""
    config = command.config_from_flags(GenerateConfig)
    with distributed.join_processes(config.distributed):
        prepared = prepare_run(config)
        signals = command.StopSignals()
        # With several processes, a signal ends the run between two steps. One process stops at
        # once.
        if jax.process_count() > 1:
            signals.listen()
        writer = text_printer.PipeWriter(sys.stdout)

        def stop() -> int | None:
            return signals.poll() if writer.error is None else signal.SIGPIPE

        try:
            outputs, stats = generate_texts(config, prepared, writer, stop)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT  # as a shell reports it
        if writer.error is not None and not isinstance(writer.error, BrokenPipeError):
            raise writer.error
        status = _report_run(outputs, stats, stop()) if distributed.is_first_process() else 0
        return multihost.broadcast_object(status)


def _report_run(
    outputs: list[request_lib.RequestOutput], stats: GenerateStats, signal_number: int | None
) -> int:
    """Print the speed and what went wrong, and return the exit status."""
    if signal_number == signal.SIGPIPE:  # the reader has all that it wanted, as with `| head`
        return 128 + signal_number
    print(stats, file=sys.stderr)
    if signal_number is not None:
        return 128 + signal_number
    broken = [i for i, output in enumerate(outputs) if output.finish_reason == "error"]
    if not broken:
        return 0
    output = outputs[broken[0]]
    print(
        f"error: prompt {broken[0]} ended after {len(output.tokens)} tokens: {output.error}",
        file=sys.stderr,
    )
    return 1


def cli() -> None:
    command.define_flags(GenerateConfig, FLAG_GROUPS)
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()

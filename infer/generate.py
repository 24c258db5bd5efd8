"""Command: write text with a checkpoint.

    python -m infer.generate --checkpoint=DIR --prompt="Why is the sky blue?"
    python -m infer.generate --checkpoint=DIR --prompts_file=FILE --max_tokens=64 --temperature=0

DIR is a release directory or one made by `m1_jax.convert`, with its tokenizer. FILE has a prompt
per line, or, named .jsonl, an object per line: {"prompt": ..., "system": ...} or
{"messages": [...], "tools": [...]}. Text goes to stdout as it comes, speed to stderr at the end.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any, TextIO

import jax.numpy as jnp
from absl import app, flags, logging

import m1_jax
from infer import batch, sampling
from infer import prompt as prompt_lib
from m1_jax import quantize
from m1_jax import tokenizer as tokenizer_lib

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _flag(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """What to generate; each field is a flag of the command."""

    checkpoint: str = _flag("", "Release directory, or one made by m1_jax.convert.")
    prompt: str | None = _flag(None, "What the user says.")
    system: str | None = _flag(None, "System message, for prompts that do not bring their own.")
    prompts_file: str | None = _flag(None, "File with a prompt per line, or .jsonl objects.")
    max_tokens: int = _flag(512, "Longest output, in tokens.")
    temperature: float = _flag(1.0, "0 always takes the most likely token.")
    top_p: float = _flag(0.95, "Keep the likeliest tokens with this probability; 1 is off.")
    top_k: int = _flag(0, "Keep this many likeliest tokens; 0 is off.")
    min_p: float = _flag(0.0, "Keep tokens this likely, relative to the likeliest; 0 is off.")
    repetition_penalty: float = _flag(1.0, "Over prompt and output; 1 is off.")
    seed: int = _flag(0, "The same seed and prompt number draw the same text.")
    dtype: str = _flag("float32", "Of the computation: float32 or bfloat16.")
    weights: str | None = _flag(None, "int8-experts or int8-all round weights; else as dtype.")
    max_length: int = _flag(0, "Most tokens of prompt and output; 0: what the model allows.")
    batch_size: int = _flag(8, "Most prompts side by side.")
    raw: bool = _flag(False, "Read prompts as they are, control tokens included: no template.")
    stream: bool = _flag(True, "Print text as it comes.")
    ignore_eos: bool = _flag(False, "Always write max_tokens tokens.")
    profile: str = _flag("release", "Chat template: release or vllm.")

    def __post_init__(self):
        wanted = {
            "checkpoint": (bool(self.checkpoint), "a directory"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "max_length": (self.max_length >= 0, "0 (the model's own) or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "dtype": (self.dtype in _DTYPES, " or ".join(_DTYPES)),
            "seed": (0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            "profile": (self.profile in prompt_lib.PROFILES, " or ".join(prompt_lib.PROFILES)),
        }
        for name, (valid, text) in wanted.items():
            if not valid:
                raise ValueError(f"--{name}: got {getattr(self, name)!r}; wanted {text}")
        quantize.check(self.weights)
        sampling.check(1, **self.sampling)
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("--prompt, --prompts_file: got both or neither; wanted one of them")
        if self.raw and self.system is not None:
            raise ValueError(
                "--system: got one with --raw, which has no place for it; leave it out"
            )

    @property
    def sampling(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _SAMPLING}


@dataclasses.dataclass(frozen=True)
class Output:
    """tokens: as generated, a stop token included. finish: "stop" or "length"."""

    tokens: list[int]
    text: str
    finish: str


def run(config: Config, out: TextIO | None = None) -> tuple[list[Output], batch.Stats]:
    """Generate for every prompt of `config`, printing text to `out` (stdout) as it comes.

    Raises:
      ValueError, OSError: an input that cannot be used, found before any generating starts.
    """
    return write(config, *prepare(config), out or sys.stdout)


def write(
    config: Config,
    model: Any,
    tokenizer: tokenizer_lib.Tokenizer,
    prompts: list[list[int]],
    out: TextIO,
) -> tuple[list[Output], batch.Stats]:
    """Do what `run` does, with what `prepare` found."""
    stop_ids = () if config.ignore_eos else tokenizer.stop_ids
    printer = _Printer(tokenizer, len(prompts), stop_ids, config.stream, out)
    tokens, stats = batch.generate(
        model,
        prompts,
        max_tokens=config.max_tokens,
        stop_ids=stop_ids,
        seed=config.seed,
        batch_size=config.batch_size,
        on_token=printer.token,
        **config.sampling,
    )
    outputs = []
    for ids, text in zip(tokens, printer.texts(), strict=True):
        outputs.append(Output(ids, text, "stop" if ids[-1] in stop_ids else "length"))
    return outputs, stats


def prepare(config: Config) -> tuple[Any, tokenizer_lib.Tokenizer, list[list[int]]]:
    """Return the model, the tokenizer and the prompts' token ids; the model is loaded last."""
    folder = pathlib.Path(config.checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint: {folder} is no directory; wanted a release or a conversion"
        )
    requests = read_requests(config)
    tokenizer = tokenizer_lib.Tokenizer.load(folder)
    prompts = [_encode(config, tokenizer, i, request) for i, request in enumerate(requests)]
    model_config = m1_jax.ModelConfig.from_file(folder / "config.json")
    batch.check(prompts, config.max_tokens, model_config, config.max_length)
    model = m1_jax.load(folder, dtype=_DTYPES[config.dtype], weights=config.weights)
    return model, tokenizer, prompts


def read_requests(config: Config) -> list[dict[str, Any]]:
    """Return {"prompt": ...} (raw) or {"messages": ..., "tools": ...} for every prompt."""
    if config.prompts_file is None:
        return [_request(config, "--prompt", {"prompt": config.prompt})]
    path = pathlib.Path(config.prompts_file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got bytes that are not UTF-8: {error}") from None
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where, value = f"{path}:{number}", {"prompt": line.removesuffix("\r")}
        if path.suffix == ".jsonl":
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
        requests.append(_request(config, where, value))
    if not requests:
        raise ValueError(f"{path}: got no prompts; wanted one per line")
    return requests


def _request(config: Config, where: str, value: Any) -> dict[str, Any]:
    keys = set(value) if isinstance(value, dict) else None
    if keys is None or not (keys <= {"prompt", "system"} or keys <= {"messages", "tools"}):
        got = sorted(keys) if keys else value
        raise ValueError(
            f'{where}: got {got!r:.80}; wanted "prompt" and "system", or "messages" and "tools"'
        )
    if "messages" in value:
        if config.raw or config.system is not None:
            raise ValueError(f"{where}: got messages with --raw or --system; wanted neither")
        return value
    prompt, system = value.get("prompt"), value.get("system", config.system)
    for name, text in (("prompt", prompt), ("system", "x" if system is None else system)):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: {name}: got {text!r}; wanted a text that is not empty")
    if not config.raw:
        front = [] if system is None else [{"role": "system", "content": system}]
        return {"messages": [*front, {"role": "user", "content": prompt}]}
    if system is not None:
        raise ValueError(f"{where}: system: got one with --raw, which has no place for it")
    return {"prompt": prompt}


def _encode(config: Config, tokenizer: tokenizer_lib.Tokenizer, i: int, request: dict) -> list[int]:
    try:
        if "prompt" in request:
            return tokenizer.encode(request["prompt"], allow_special=True)
        return prompt_lib.encode(
            tokenizer, request["messages"], request.get("tools"), profile=config.profile
        )
    except ValueError as error:
        raise ValueError(f"prompt {i}: {error}") from None


class _Printer:
    """Prints texts as their tokens come: one alone as it is, several by lines marked `[i] `."""

    def __init__(self, tokenizer, count: int, stop_ids, stream: bool, out: TextIO):
        self._decoders = [tokenizer.decoder() for _ in range(count)]
        self._pieces: list[list[str]] = [[] for _ in range(count)]
        self._unprinted = [""] * count
        self._stop_ids, self._stream, self._out = stop_ids, stream, out

    def texts(self) -> list[str]:
        return ["".join(pieces) for pieces in self._pieces]

    def token(self, number: int, token: int, last: bool) -> None:
        decoder = self._decoders[number]
        piece = "" if token in self._stop_ids else decoder.push(token)
        if last:
            piece += decoder.flush()
        self._pieces[number].append(piece)
        if self._stream:
            self._print(number, piece, last)
        elif last:
            self._print(number, "".join(self._pieces[number]), last)

    def _print(self, number: int, piece: str, last: bool) -> None:
        text = self._unprinted[number] + piece
        if last and not text.endswith("\n"):
            text += "\n"
        if len(self._pieces) > 1:
            *lines, self._unprinted[number] = text.split("\n")
            text = "".join(f"[{number}] {line}\n" for line in lines)
        if text:
            self._out.write(text)
            self._out.flush()


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step at INFO
    names = [field.name for field in dataclasses.fields(Config)]
    try:
        config = Config(**{name: getattr(flags.FLAGS, name) for name in names})
        prepared = prepare(config)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))
    try:
        _, stats = write(config, *prepared, sys.stdout)
    except KeyboardInterrupt:
        sys.exit(130)
    print(stats, file=sys.stderr)


def _define_flags() -> None:
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for field in dataclasses.fields(Config):
        define.get(field.type, flags.DEFINE_string)(
            field.name, field.default, field.metadata["help"]
        )


def cli() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    cli()

"""What `infer.offline` reads: its flags, and the requests of its input."""

import dataclasses
from typing import Any

import m1_jax
from infer import batch_output, command, jsonl, openai_batch, request_check
from infer import options as options_lib
from infer import prompt as prompt_lib
from m1_jax import command_mesh, distributed, quantize
from m1_jax import tokenizer as tokenizer_lib

_flag = command.flag_field
# Fields of `BatchConfig` by their title in --help.
FLAG_GROUPS = {
    "Files": ("input", "output", "tokens"),
    "Model and devices": ("checkpoint", "dtype", "weights", "mesh", "lightning", "distributed"),
    "Requests": ("defaults", "seed", "system", "raw", "profile", "max_length"),
    "Engine": ("max_rows", "num_pages", "num_snapshots", "draft_tokens"),
    "Output": ("progress",),
}
_MAX_LISTED_BAD_LINES = 10  # one error lists so many
_LINE_FIELDS = (*jsonl.REQUEST_FIELDS, "id", "preset")


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """One run. Each field is a flag of the command."""

    checkpoint: str = _flag("", "Release directory, or one made by m1-convert.", required=True)
    input: str = _flag("", "JSONL file of requests.", required=True)
    output: str = _flag("", "JSONL file to write, or to go on with.", required=True)
    defaults: str = _flag("{}", 'Options for lines without their own: {"max_tokens": 100, ...}.')
    seed: int = _flag(0, "Seed of the run; a line without a seed gets one from it.")
    tokens: bool = _flag(False, "Write each token with its log-probabilities.")
    system: str | None = _flag(None, "System message for prompts without their own.")
    raw: bool = _flag(False, "Read prompts as they are, control tokens included: no template.")
    profile: str = _flag("release", "Chat template: release or vllm.")
    dtype: str | None = _flag(None, command_mesh.DTYPE_HELP)
    weights: str | None = _flag(None, "int8-experts or int8-all. Default: as --dtype.")
    mesh: str | None = _flag(None, command_mesh.MESH_HELP)
    lightning: str | None = _flag(None, command_mesh.LIGHTNING_HELP)
    distributed: bool = _flag(False, distributed.DISTRIBUTED_HELP)
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
            "max_length": (self.max_length >= 0, "0 (the model's own) or more"),
            "max_rows": (self.max_rows >= 1, "1 or more"),
        }
        command.check_fields(self, checks)
        command.check_paths(self, ("checkpoint", "input", "output"))
        quantize.check_recipe(self.weights)
        command_mesh.check_model_flags(self.dtype, self.mesh, self.lightning)
        _ = self.options  # raises for defaults that are no options

    @property
    def model_choice(self) -> command.ModelChoice:
        return command.ModelChoice(
            self.checkpoint, self.dtype, self.weights, self.mesh, self.lightning
        )

    @property
    def options(self) -> options_lib.Options:
        """Return the options of lines that have none of their own.

        Raises:
          ValueError: --defaults is not an object of options.
        """
        with jsonl.locate_errors("--defaults"):
            values = jsonl.parse_line("--defaults", self.defaults)
            if not isinstance(values, dict):
                raise ValueError(f"got {self.defaults}; wanted a JSON object")
            if values.get("seed") is not None:
                raise ValueError(
                    f"seed: got {values['seed']!r:.80}; wanted it as --seed, which all lines' own "
                    "seeds are made from"
                )
            return jsonl.options_from_fields(options_lib.Options(), values)


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """A request of the input."""

    index: int  # among the lines that are not blank, from 0
    output_fields: dict[str, Any]  # what the output's line begins with: index and id
    prompt: tuple[int, ...]  # token ids
    options: options_lib.Options  # the request's options, with a seed of its own
    line: str  # as it stands in the input


def read_requests(
    config: BatchConfig, tokenizer: tokenizer_lib.Tokenizer, model_config: m1_jax.ModelConfig
) -> list[BatchRequest]:
    """Return all requests of the input, which is read once: it may be a pipe.

    Raises:
      ValueError: bad lines, of which the error lists up to `_MAX_LISTED_BAD_LINES`.
      OSError: the input cannot be read.
    """
    path = command.local_path("input", config.input)
    lines = jsonl.read_json_lines(path)
    if not lines:
        raise ValueError(f"{path}: got no requests; wanted one per line")
    reader = _RequestReader(config, tokenizer, model_config)
    requests, errors = [], []
    for index, (location, text) in enumerate(lines):
        try:
            with jsonl.locate_errors(location):
                requests.append(reader.parse_request(index, location, text))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        num_unlisted = len(errors) - _MAX_LISTED_BAD_LINES
        unlisted = [f"and {num_unlisted} more"] if num_unlisted > 0 else []
        listed = [*errors[:_MAX_LISTED_BAD_LINES], *unlisted]
        # A single error stays on the line.
        gap = "\n  " if len(listed) > 1 else " "
        raise ValueError(
            f"got {len(errors)} bad lines of {len(lines)}; nothing was run:"
            + "".join(gap + line for line in listed)
        )
    return requests


class _RequestReader:
    """Turns lines into requests.

    It remembers ids, which may not be repeated.
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
        self._options_checker = request_check.OptionsChecker(tokenizer, model_config.vocab_size)

    def parse_request(self, index: int, location: str, text: str) -> BatchRequest:
        """Return the request of one line.

        Raises:
          ValueError: a line that cannot be served.
        """
        value = jsonl.parse_line(location, text)
        if not isinstance(value, dict):
            raise ValueError(f"got {value!r:.80}; wanted an object")
        line_fields = _LINE_FIELDS
        if openai_batch.is_batch_line(value):
            value = openai_batch.translate_line(jsonl.drop_nulls(value), self._config.tokens)
            line_fields = ("messages", "tools", "custom_id")
        value = jsonl.drop_nulls(value)
        options_lib.check_names("field", value, (*line_fields, *self._names))
        conversation = {k: v for k, v in value.items() if k in jsonl.REQUEST_FIELDS}
        config = self._config
        conversation = jsonl.check_conversation(conversation, config.system, config.raw)
        prompt = jsonl.encode_request(self._tokenizer, conversation, config.profile)
        own_options = {k: v for k, v in value.items() if k == "preset" or k in self._names}
        options = jsonl.options_from_fields(self._defaults, own_options)
        if "seed" not in own_options:
            options = dataclasses.replace(options, seed=jsonl.derive_seed(config.seed, index))
        limits = (self._model_config, config.max_length, config.num_pages)
        jsonl.check_prompt_length(prompt, options.max_tokens, *limits)
        # These raise now what `Engine.submit` would raise later, when other requests have run.
        ids = request_check.plain_token_ids(prompt, self._model_config.vocab_size)
        self._options_checker.check(options)
        fields = {"index": index, **self._make_id_field(location, value)}
        # All that the output's line will have from this one is tried now.
        batch_output.encode_record(fields)
        return BatchRequest(index, fields, ids, options, text)

    def _make_id_field(self, location: str, value: dict[str, Any]) -> dict[str, Any]:
        """Return the line's name under the field that it has it in, {} for a line without one."""
        field = "custom_id" if "custom_id" in value else "id"
        if field not in value:
            return {}
        name = jsonl.to_whole_number(value[field])
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ValueError(f"{field}: got {name!r:.80}; wanted text or a whole number")
        # By repr: 1 and "1" are different ids.
        first = self._ids.setdefault(repr(name), location)
        if first != location:
            raise ValueError(
                f"{field}: got {name!r:.80} again, first at {first}; wanted another one"
            )
        return {field: name}

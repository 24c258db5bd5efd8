"""Commands of the documents: their flags are checked, and they run in this process at tiny sizes.

Nothing of a command is checked that the command itself would not check: flags by its own parser,
configs and overrides by `configlib`, meshes and slices by the functions that the command calls.
"""

import contextlib
import importlib
import importlib.util
import pathlib
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence

import jax
from absl import flags, logging
from doc_blocks import REPO, split_commands

from infer import batch_input, command, generate
from m1_jax import command_mesh, configlib
from m1_jax.plan import config as plan_config
from m1_jax.plan import topology
from train import config as train_config

_ASSIGNMENT_PATTERN = re.compile(r"^[A-Z][A-Z0-9_]*=")
_PREFIXES = ("nohup", "time", "sudo")
# Programs whose words are not ours to check.
_FOREIGN_PROGRAMS = frozenset(
    (
        "cat",
        "cd",
        "cmp",
        "cp",
        "curl",
        "df",
        "diff",
        "docker",
        "du",
        "echo",
        "export",
        "git",
        "head",
        "hf",
        "ls",
        "mkdir",
        "mount",
        "nproc",
        "rm",
        "source",
        "sh",
        "sort",
        "tail",
        "tensorboard",
        "tmux",
        "unset",
        "uv",
        "wc",
    )
)
# Words of an address or a name that a user has to fill in.
_PLACEHOLDERS = ("FILE", "DIR", "RUN", "NEW")
_PLAN_FLAGS = ("topology", "config", "mesh", "serving_mesh", "seq", "batch", "slices", "accumulate")
# Steps of the recipes at which a tiny run has a checkpoint or an evaluation.
_TINY_STEPS = {
    "--from_step=50": "--from_step=2",
    "--set=evaluation.every_steps=50": "--set=evaluation.every_steps=2",
}
# Commands whose flags are the fields of a dataclass.
_CONFIG_CLASSES = {
    "m1-batch": batch_input.BatchConfig,
    "m1-generate": generate.GenerateConfig,
    "m1-plan": plan_config.PlanConfig,
}
# gcloud's flags by command, from the vendor's reference as of 2026-11-25.
_GCLOUD_FLAGS = {
    "compute tpus queued-resources create": (
        "node-id node-count node-prefix zone accelerator-type runtime-version spot reserved "
        "valid-until-duration"
    ),
    "compute tpus queued-resources describe": "zone",
    "compute tpus queued-resources delete": "zone force async quiet",
    "compute tpus tpu-vm create": "zone accelerator-type version spot reserved",
    "compute tpus tpu-vm ssh": "zone worker command",
    "compute tpus tpu-vm scp": "zone worker recurse",
    "compute tpus tpu-vm delete": "zone quiet",
    "storage buckets create": "location uniform-bucket-level-access",
    "storage buckets describe": "format",
    "storage cp": "recursive",
    "storage rsync": "recursive",
    "storage du": "summarize readable-sizes",
}


class CommandError(AssertionError):
    """A command of a document that would not run. The message says why."""


def load_generator(name: str):
    """Return the module docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, REPO / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


make_commands = load_generator("make_commands")


def own_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return name and arguments if the words are one of our commands, else None."""
    scripts = make_commands.read_scripts()
    if words[0] in scripts:
        return words[0], list(words[1:])
    if words[0].startswith("m1-"):
        raise CommandError(f"{words[0]}: got no such script; wanted one of {', '.join(scripts)}")
    if list(words[:2]) == ["python", "-m"]:
        by_module = {make_commands.module_name(target): name for name, target in scripts.items()}
        if words[2] in by_module:
            return by_module[words[2]], list(words[3:])
    return None


# ---- checks


def check_line(line: str) -> None:
    """Check every command of a line of a bash block.

    Raises:
      CommandError: a program, flag, file or value that does not exist.
    """
    for words in split_commands(line):
        words = strip_prefixes(words)
        if words:
            _check_words(words)


def strip_prefixes(words: Sequence[str]) -> list[str]:
    """Return the words without assignments, and without programs that run another one."""
    words = list(words)
    while words and (_ASSIGNMENT_PATTERN.match(words[0]) or words[0] in _PREFIXES):
        words.pop(0)
    return words


def _check_words(words: list[str]) -> None:
    own = own_command(words)
    if own is not None:
        check_own_command(*own)
    elif words[0] in ("pip", "python", "uv") and "pip" in words[:3]:
        _check_extras(words)
    elif words[0] == "python" or words[0].endswith("/python"):
        _check_python(words[1:])
    elif words[0] == "make":
        _check_make(words[1:])
    elif words[0] == "pytest":
        _check_files(words[1:])
    elif words[0] == "gcloud":
        _check_gcloud(words[1:])
    elif words[0] not in _FOREIGN_PROGRAMS | {".ci/run"}:
        raise CommandError(f"got the program {words[0]!r}, which is none that this test knows")


def check_own_command(name: str, arguments: Sequence[str]) -> None:
    """Parse a command's arguments as it does itself, and check what they name.

    Raises:
      CommandError: an argument that the command would refuse.
    """
    with make_commands.open_command(name) as command:
        values = _parse_arguments(command, arguments)
        try:
            _check_values(name, values)
        except ValueError as error:
            raise CommandError(f"{name}: {error}") from None


def _parse_arguments(command, arguments: Sequence[str]) -> flags.FlagValues:
    try:
        left = command.parse([command.name, *arguments])
    except (flags.Error, SystemExit) as error:
        raise CommandError(f"{command.name} {' '.join(arguments)}: {error}") from None
    if left[1:]:
        if command.name != "m1-rl":
            raise CommandError(f"{command.name}: got the argument {left[1]!r}")
        slime_flags = importlib.import_module("train.rl.slime_flags")
        try:
            slime_flags.translate_flags(slime_flags.parse_flags(left[1:]))
        except ValueError as error:
            raise CommandError(f"{command.name}: {error}") from None
    return flags.FLAGS


def _check_values(name: str, values: flags.FlagValues) -> None:
    def value(flag: str) -> str:
        return (values[flag].value or "") if flag in values else ""

    for flag in ("mesh", "serving_mesh"):
        if value(flag):
            command_mesh.parse_axis_sizes(value(flag))
    if value("topology"):
        count, times, slice_name = value("topology").rpartition(" x ")
        topology.parse_slice(slice_name, int(count) if times else 1)
    if name in _CONFIG_CLASSES:
        command.config_from_flags(_CONFIG_CLASSES[name])  # it checks itself
    config = value("config")
    if name == "m1-plan" or not config or config in _PLACEHOLDERS:
        return
    path = REPO / config.partition(":")[0]
    if not path.is_file():
        raise CommandError(f"{name} --config={config}: there is no such file")
    configlib.load_config(str(REPO / config), values["set"].value)


def _check_extras(words: Sequence[str]) -> None:
    """Check that every extra of ours that is installed exists."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for word in words:
        match = re.search(r"(?:^\.|m1[-_]jax\S*?)\[([\w,-]+)\]", word)
        for extra in match[1].split(",") if match else ():
            if extra not in project["optional-dependencies"]:
                raise CommandError(f"pip: got the extra {extra!r}, which pyproject.toml lacks")


def _check_python(arguments: Sequence[str]) -> None:
    """Check a script of the repository, and that its source has the flags."""
    if arguments[0] == "-m":
        if arguments[1] == "pytest":
            return _check_files(arguments[2:])
        if arguments[1] in ("venv", "pip", "sphinx"):
            return None
        path = REPO.joinpath(*arguments[1].split(".")).with_suffix(".py")
        arguments = arguments[1:]
    else:
        path = REPO / arguments[0]
    if not path.is_file():
        raise CommandError(f"python {arguments[0]}: there is no such file")
    source = path.read_text()
    for argument in arguments[1:]:
        flag = argument.partition("=")[0].removeprefix("--").removeprefix("no")
        if argument.startswith("--") and not re.search(rf'"(?:--)?(?:no)?{flag}"', source):
            raise CommandError(f"python {arguments[0]}: got --{flag}, which its source lacks")
    return None


def _check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"(?m)^([\w-]+):", (REPO / "Makefile").read_text())
    for word in words:
        if "=" not in word and word not in targets:
            raise CommandError(f"make: got {word!r}; wanted one of {', '.join(targets)}")


def _check_files(words: Sequence[str]) -> None:
    """Check that the test files that pytest is given exist."""
    for word in words:
        path = word.partition("::")[0]
        if path.endswith(".py") and not (REPO / path).is_file():
            raise CommandError(f"pytest: there is no {path}")


def _check_gcloud(words: Sequence[str]) -> None:
    text = " ".join(words)
    known = [command for command in _GCLOUD_FLAGS if text.startswith(f"{command} ")]
    if not known:
        raise CommandError(f"gcloud {text:.60}: wanted one of {', '.join(_GCLOUD_FLAGS)}")
    for word in words:
        flag, _, value = word.partition("=")
        if word.startswith("--"):
            if flag.removeprefix("--") not in _GCLOUD_FLAGS[known[0]].split():
                raise CommandError(f"gcloud {known[0]}: got the flag {flag}")
            if flag == "--command":
                check_line(value)


# ---- runs


def run_line(line: str, folder: pathlib.Path) -> None:
    """Run a line of a bash block in the current directory, which is `folder`.

    Our own commands run in this process, at tiny sizes. All else is bash's.

    Raises:
      CommandError: a command that fails.
    """
    commands = split_commands(line)
    own = own_command(strip_prefixes(commands[0])) if len(commands) == 1 else None
    if own is not None:
        run_own_command(*own)
        return
    # A pipe's status is that of its last command, unless bash is told otherwise.
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise CommandError(f"{line}: status {done.returncode}\n{done.stdout}{done.stderr}")


def run_own_command(name: str, arguments: Sequence[str]) -> None:
    """Run one of our commands in this process, at a tiny size.

    Raises:
      CommandError: it ends with another status than 0.
    """
    arguments = shrink_arguments(name, arguments)
    with make_commands.open_command(name) as command, _kept_settings():
        try:
            status = command.main(command.parse([name, *arguments]))
        except (SystemExit, flags.Error) as error:
            status = error.code if isinstance(error, SystemExit) else str(error)
    if status not in (None, 0):
        raise CommandError(f"{name} {' '.join(arguments)}: ended with {status}")


@contextlib.contextmanager
def _kept_settings() -> Iterator[None]:
    """Leave signals, verbosity and the compilation cache as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    verbosity, cache = logging.get_verbosity(), jax.config.jax_compilation_cache_dir
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        logging.set_verbosity(verbosity)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def shrink_arguments(name: str, arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with what makes the run tiny. Later flags replace earlier."""
    arguments = list(arguments)
    if name == "m1-generate":
        return [*arguments, "--max_tokens=8"]
    if name == "m1-batch":
        return [*arguments, "--noprogress"]
    if name == "m1-rehearse":
        return [*arguments, "--steps=8", "--workers=1"]
    if name == "m1-plan":
        kept = [word for word in arguments if word.partition("=")[0][2:] not in _PLAN_FLAGS]
        return [*kept, "--topology=v5p:2x2x1", "--config=tiny", "--seq=64", "--batch=4"]
    if name in ("m1-pretrain", "m1-sft", "m1-rl"):
        arguments = [_TINY_STEPS.get(word, word) for word in arguments]
        return [*arguments, *_shrink_run(arguments)]
    return arguments


def _shrink_run(arguments: Sequence[str]) -> list[str]:
    """Return overrides for two steps of each stage, or for one batch."""
    configs = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    if not configs:  # it goes on with the config that the run has
        return []
    config = configlib.load_config(configs[-1])
    sets = ["compilation_cache=" + str(jax.config.jax_compilation_cache_dir)]
    if isinstance(config, train_config.TrainConfig):
        sets += ["save.every_steps=2", "evaluation.every_steps=0"]
        for index, stage in enumerate(config.stages):
            tokens = 2 * stage.rows * stage.seq_len
            sets += [f"stages.{index}.tokens={tokens}", f"stages.{index}.warmup_tokens=0"]
    else:
        sets += ["batches=1", "rollout.groups=4", "rollout.dynamic=False"]
        sets += ["evaluation.every_batches=0"]
    # The page's own values count.
    named = {word.removeprefix("--set=").partition("=")[0] for word in arguments}
    return [f"--set={each}" for each in sets if each.partition("=")[0] not in named]

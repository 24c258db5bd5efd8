"""What every installed command answers to --help, --version and arguments that it does not have."""

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from absl import app, flags

from m1_jax import command_help, version

_REPO = pathlib.Path(__file__).resolve().parents[1]
_SCRIPTS = tomllib.loads((_REPO / "pyproject.toml").read_text())["project"]["scripts"]
_HELP_NAMES = {"help", "helpshort", "helpfull", "version"}
# Sentences that say a default, or that there is none because the flag must be given.
_DEFAULT_PATTERN = re.compile(r"Required\.|[Dd]efaults?\b")


class CommandRun:
    """One call of a command's `cli` in this process, up to its flags: `main` is not called."""

    def __init__(self, script, monkeypatch, capsys):
        self.script = script
        module, function = _SCRIPTS[script].split(":")
        self._cli = getattr(importlib.import_module(module), function)
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments, with_main=False):
        """Return status, stdout, stderr and the names of the flags that the command defined."""

        def run_parser(main, flags_parser):
            rest = flags_parser(sys.argv)
            return main(rest) if with_main else None

        self._monkeypatch.setattr(app, "run", run_parser)
        self._monkeypatch.setattr(command_help, "_groups", {})
        self._monkeypatch.setattr(sys, "argv", [self.script, *arguments])
        earlier_names, status = set(flags.FLAGS), 0
        try:
            self._cli()
        except SystemExit as stop:
            status = stop.code
        names = set(flags.FLAGS) - earlier_names - {"h"}
        for name in set(flags.FLAGS) - earlier_names:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        printed = self._capsys.readouterr()
        return status, printed.out, printed.err, names


@pytest.fixture(params=sorted(_SCRIPTS))
def command(request, monkeypatch, capsys):
    return CommandRun(request.param, monkeypatch, capsys)


def _shown_flags(text):
    """Return the text of each flag by its name."""
    parts = re.split(r"(?m)^  (?:-h, )?--(?:\[no\])?(\w+)", text)[1:]
    # The last flag of a group is followed by the next title, after an empty line.
    texts = (" ".join(part.split("\n\n")[0].split()) for part in parts[1::2])
    return dict(zip(parts[::2], texts, strict=True))


def test_help_shows_every_flag_with_its_default(command):
    status, text, errors, names = command("--help")
    assert (status, errors) == (0, "")
    shown = _shown_flags(text)
    assert shown.keys() == names
    assert names > _HELP_NAMES
    # The flag itself, such as "=TEXT", is cut off. A sentence of its own has to remain.
    texts = {name: re.sub(r"^=\S+", "", entry) for name, entry in shown.items()}
    assert not [name for name, entry in texts.items() if len(entry.split()) < 2]
    undefined = [name for name, entry in texts.items() if not _DEFAULT_PATTERN.search(entry)]
    assert set(undefined) == _HELP_NAMES
    assert command_help._OTHER_GROUP not in text  # every flag has a group
    assert max(map(len, text.splitlines())) <= 100
    doc = sys.modules[_SCRIPTS[command.script].split(":")[0]].__doc__
    assert doc.strip().removeprefix("Command: ")[1:60] in text


def test_short_and_full_help(command):
    status, short_text, _, names = command("--helpshort")
    assert status == 0
    lines = [line for line in short_text.splitlines() if re.match("  (-h, )?--", line)]
    assert len(lines) == len(names)
    status, full_text, _, _ = command("--helpfull")
    assert status == 0
    assert "--verbosity=N" in full_text  # a flag of absl
    assert names < _shown_flags(full_text).keys()


def test_version(command):
    status, text, _, _ = command("--version")
    assert status == 0
    assert text.rstrip().endswith(f"(m1-jax {version.VERSION})")


def test_arguments_that_are_refused(command):
    if command.script == "m1-rl":  # it takes slime's flags, see below
        return
    for argument, words in (
        ("--hlep", "unknown flag --hlep; did you mean --help?"),
        ("--xyzzy=3", "unknown flag --xyzzy; "),
        ("other", "got the argument 'other'; wanted flags alone, each as --name=value;"),
    ):
        # With the flags that must be given, since none of them may be what is refused.
        values = {"to": "hf", "job": "train"}
        required = [f"--{name}={values.get(name, 'x')}" for name in _required_names(command)]
        status, text, errors, _ = command(argument, *required)
        assert (status, text) == (2, "")
        assert errors.startswith(f"error: {words}")
        assert errors.count("\n") == 1


def _required_names(command):
    shown = _shown_flags(command("--help")[1])
    return [name for name, entry in shown.items() if entry.endswith("Required.")]


def test_required_flags_are_named_together(command):
    required = _required_names(command)
    status, _, errors, _ = command()
    if not required:
        assert (status, errors) == (0, "")
        return
    assert status == 2
    missing = " and no ".join(f"--{name}" for name in required)
    assert errors.startswith(f"error: got no {missing};")


@pytest.mark.parametrize(
    ("script", "argument", "words"),
    [
        ("m1-convert", "--memory_gib=much", "--memory_gib: got 'much'; wanted a number;"),
        ("m1-convert", "--to=torch", "--to: got 'torch'; wanted orbax or hf;"),
        ("m1-convert", "--progress=maybe", "--progress: got 'maybe'; wanted true or false;"),
        ("m1-convert", "--noprogres", "unknown flag --noprogres; did you mean --noprogress?"),
        ("m1-pretrain", "--from_step=0", "--from_step: got '0'; wanted a positive integer;"),
        ("m1-batch", "--max_rows=1.5", "--max_rows: got '1.5'; wanted an integer;"),
        ("m1-generate", "--max-tokens=3", "unknown flag --max-tokens; did you mean --max_tokens?"),
        ("m1-verify", "--golden", "Missing value for flag --golden;"),
    ],
)
def test_values_that_are_refused(monkeypatch, capsys, script, argument, words):
    status, text, errors, _ = CommandRun(script, monkeypatch, capsys)(argument)
    assert (status, text) == (2, "")
    assert errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--confg=x"], "unknown flag --confg; did you mean --config?"),
        (
            ["--config=configs/tiny_cispo.py:x", "--form_step=3"],
            "unknown flag --form_step; did you",
        ),
        (["--config=configs/tiny_cispo.py:x", "--lr=x"], "--lr: got 'x'"),
        (["--lr=1e-6"], "got '--lr=1e-6' without --config"),
        (["--config=configs/tiny_cispo.py:x", "there"], "got 'there'; wanted a flag"),
    ],
)
def test_further_flags_of_rl(monkeypatch, capsys, tmp_path, arguments, words):
    run = CommandRun("m1-rl", monkeypatch, capsys)
    status, _, errors, _ = run(f"--workdir={tmp_path / 'run'}", *arguments, with_main=True)
    assert status == 2
    assert errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_command_of_its_own_process():
    """absl's own parts are between: they must neither print nor change the status."""
    for arguments, status in ((["--help"], 0), (["--srcc=x"], 2)):
        command = [sys.executable, "-m", "m1_jax.convert", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert (done.stdout == "") == (status == 2)
        assert done.stderr.count("\n") == (status == 2)
    assert "did you mean --src? python -m m1_jax.convert --help lists all flags" in done.stderr

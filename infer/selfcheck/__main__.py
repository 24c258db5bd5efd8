"""`python -m infer.selfcheck`: see `command.py`."""

from infer.selfcheck import command

if __name__ == "__main__":
    command.cli()

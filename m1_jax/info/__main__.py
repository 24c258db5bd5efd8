"""`python -m m1_jax.info`."""

from m1_jax.info import command

if __name__ == "__main__":
    command.cli()

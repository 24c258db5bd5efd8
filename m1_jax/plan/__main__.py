"""`python -m m1_jax.plan`."""

from m1_jax.plan import command

if __name__ == "__main__":
    command.cli()

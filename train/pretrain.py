"""Command: continued pretraining.

    python -m train.pretrain --config=configs/tiny_pretrain.py --workdir=DIR [--set=FIELD=VALUE]
    python -m train.pretrain --workdir=DIR

The second form goes on with the run in DIR. The first one does so, too, if the config is the same.
"""

from train import command, loop
from train import config as config_lib


def run(config: config_lib.TrainConfig | None, workdir) -> loop.TrainSummary:
    """Train as `config` says in `workdir`. None goes on with the run there."""
    return loop.run_training(config, workdir)


def cli() -> None:
    command.cli(run)


if __name__ == "__main__":
    cli()

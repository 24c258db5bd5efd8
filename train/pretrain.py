"""Command: continued pretraining.

    python -m train.pretrain --config=configs/tiny_pretrain.py --workdir=DIR [--set=FIELD=VALUE]
    python -m train.pretrain --workdir=DIR

The second form goes on with the run in DIR. The first one does so, too, if the config is the same.
--allow_change=FIELD goes on with a field changed, --from_step=N from an earlier checkpoint.
--init_from=RUN begins a new run with the weights of another one.
"""

from train import command, loop, resume
from train import config as config_lib


def run(
    config: config_lib.TrainConfig | None,
    workdir,
    options: resume.ResumeOptions = resume.NO_OPTIONS,
) -> loop.TrainSummary:
    """Train as `config` says in `workdir`. None goes on with the run there."""
    return loop.run_training(config, workdir, options)


def cli() -> None:
    command.cli(run)


if __name__ == "__main__":
    cli()

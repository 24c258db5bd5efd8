"""Command: supervised fine-tuning on conversations, with the loss on the assistant's tokens.

    python -m train.sft --config=configs/tiny_sft.py --workdir=DIR [--set=FIELD=VALUE]
    python -m train.sft --workdir=DIR

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
    """Train as `config` says in `workdir`. None goes on with the run there.

    Raises:
      ValueError: a source is of another kind than "chat". See also `loop.run_training`.
    """
    # A config that is already in the directory was checked when its run began.
    for source in config.data.sources if config is not None else ():
        if source.kind != "chat":
            raise ValueError(
                f"data.sources: {source.name!r} is of kind {source.kind!r}; wanted 'chat', "
                "whose loss is on the assistant's tokens alone (plain text: train.pretrain)"
            )
    return loop.run_training(config, workdir, options)


def cli() -> None:
    command.cli(run)


if __name__ == "__main__":
    cli()

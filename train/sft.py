"""Command: supervised fine-tuning on conversations; the loss is on what the assistant says.

    python -m train.sft --config=configs/tiny_sft.py --workdir=DIR [--set=FIELD=VALUE]
    python -m train.sft --workdir=DIR

The second form goes on with the run that DIR holds; so does the first, if the config is the same.
"""

from train import command, loop
from train import config as config_lib


def run(config: config_lib.TrainConfig | None, workdir) -> loop.TrainSummary:
    """Train as `config` says in `workdir`; None goes on with the run there.

    Raises:
      ValueError: a source that is not of conversations, besides what `loop.run_training` raises.
    """
    for source in config.data.sources if config is not None else ():
        if source.kind != "chat":
            raise ValueError(
                f"data.sources: {source.name!r} is of kind {source.kind!r}; wanted 'chat', "
                "whose loss is on the assistant's tokens alone (plain text: train.pretrain)"
            )
    return loop.run_training(config, workdir)


def cli() -> None:
    command.cli(run)


if __name__ == "__main__":
    cli()

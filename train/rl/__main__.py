"""Command: reinforcement learning (CISPO and its relatives) on tasks with rewards.

    python -m train.rl --config=configs/tiny_cispo.py --workdir=DIR [--set=FIELD=VALUE]
    python -m train.rl --workdir=DIR

The second form goes on with the run that DIR holds. So does the first, if the config is the same.
--allow_change=FIELD goes on with a field changed, --from_step=N from an earlier checkpoint.
--init_from=RUN begins a new run with the weights of another one.
slime's flags of the objective and of sampling (--advantage-estimator, --eps-clip-high,
--n-samples-per-prompt, ...) are understood too, and change the config. `train/rl/slime_flags.py`
lists them.
"""

from train import command, resume
from train.rl import config as rl_config
from train.rl import loop as rl_loop
from train.rl import slime_overrides


def run(
    config: rl_config.RlConfig | None,
    workdir,
    options: resume.ResumeOptions = resume.NO_OPTIONS,
):
    """Train as `config` says in `workdir`. None goes on with the run there.

    Raises:
      ValueError: anything that is wrong, before the first batch.
    """
    return rl_loop.run_rl_training(config, workdir, options)


def cli() -> None:
    command.cli(run, slime_overrides.apply_flags)


if __name__ == "__main__":
    cli()

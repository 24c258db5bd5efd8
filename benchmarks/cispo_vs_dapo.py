"""CISPO against DAPO and GRPO on a toy with a rare token that matters (M1 3.1's argument).

    python benchmarks/cispo_vs_dapo.py --quick --dir=DIR [--plot=FILE.png]

In the first table the arms differ in their clip rule alone. Aggregation (token-mean), tasks, order
of tasks and the seed of every sample are equal. With --full, a second table has the arms as they
were published. The measures were fixed before the first run (`cispo_curves.py`), and every seed is
shown.

--gate: three batches of one seed, with 1 and with 16 updates, which the tests check.
--quick: task a (W begins 2% of the answers), 16 updates a batch, two rates, three seeds. It takes
  about half an hour on two cores.
--full: tasks a and b (W begins half of the answers, and no difference is expected), 1, 4 and 16
  updates. Three rates are tried on two seeds and compared on five others. Then the published
  presets follow.

--rates and --batches replace those of the plan. Name them when you publish such numbers.

A finished run is kept in DIR and not repeated. A stopped run goes on. The script needs the
package's own dependencies, and matplotlib for --plot.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import shutil
import sys
import time

# By path, the script's own directory comes first; the packages lie above it.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import cispo_curves
import cispo_report
import cispo_tasks
import jax
import tqdm

from m1_jax import configlib
from train import metrics
from train.rl import config as rl_config
from train.rl import loop as rl_loop
from train.rl import objective as objective_lib

PUBLISHED = {name: objective_lib.PRESETS[name] for name in ("grpo", "dapo", "cispo")}
# Arms that are equal in all but the clip rule, as the presets of DAPO and CISPO are already.
CLIP = PUBLISHED | {"grpo": dataclasses.replace(PUBLISHED["dapo"], name="grpo", clip_high=0.2)}
ARMS = {"clip": CLIP, "published": PUBLISHED}


@dataclasses.dataclass(frozen=True)
class ExperimentPlan:
    """The runs of a command."""

    name: str
    tasks: tuple[str, ...]  # of `cispo_tasks.FORK_SHARES`
    updates: tuple[int, ...]  # updates a generation batch, a section each
    rates: tuple[float, ...]  # learning rates; the first is the common one
    tuning_seeds: tuple[int, ...]  # seeds that choose each arm's rate; empty: `seeds` choose it
    seeds: tuple[int, ...]  # seeds that are compared
    batches: int  # generation batches a run
    tables: tuple[str, ...] = ("clip",)  # of `ARMS`
    published_updates: tuple[int, ...] = (16,)  # updates a batch in the second table
    groups: int = 64  # tasks a batch
    group_size: int = 8  # samples a task
    learn_steps: int = 1000  # see `cispo_tasks.tune_model`
    set_steps: int = 300  # see `cispo_tasks.tune_model`


PLANS = {
    "gate": ExperimentPlan("gate", ("a",), (1, 16), (3e-4,), (), (0,), 3),
    "quick": ExperimentPlan("quick", ("a",), (16,), (3e-4, 5e-4), (), (0, 1, 2), 16),
    "full": ExperimentPlan(
        "full",
        ("a", "b"),
        (1, 4, 16),
        (3e-4, 5e-4, 1e-3),
        (100, 101),
        (0, 1, 2, 3, 4),
        30,
        ("clip", "published"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run. Its text is the name of its file."""

    table: str
    task: str
    updates: int
    rate: float
    arm: str
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.table}-{self.task}-updates{self.updates}-rate{self.rate:g}-{self.arm}"
            f"-seed{self.seed}"
        )


class Lab:
    """Makes the runs of a plan, and keeps each in a file of a directory."""

    def __init__(self, plan: ExperimentPlan, directory: pathlib.Path):
        self.plan, self._directory = plan, directory
        self._start_secs, self._num_runs = time.monotonic(), 0

    def curves(self, trials: list[Trial]) -> dict[Trial, dict]:
        """Return the record of each run. Missing runs are made now."""
        return {trial: self._curve(trial) for trial in trials}

    def _curve(self, trial: Trial) -> dict:
        file = self._directory / self.plan.name / f"{trial}.json"
        wanted = self.config(trial)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(self._run(trial, wanted), indent=1))
            part.rename(file)
        record = json.loads(file.read_text())
        if configlib.from_json(rl_config.RlConfig, record["config"]) != wanted:
            raise ValueError(
                f"{file}: got a run of another config; wanted that of this code and plan. Move "
                "it away, or give a new --dir."
            )
        return record

    def home(self, task: str) -> pathlib.Path:
        """Return the directory of a task's model."""
        return self._directory / f"model-{task}-{self.plan.learn_steps}-{self.plan.set_steps}"

    def config(self, trial: Trial) -> rl_config.RlConfig:
        """Return the run's config, and make its model first where it is missing."""
        plan = self.plan
        home = self.home(trial.task)
        share = cispo_tasks.FORK_SHARES[trial.task]
        checkpoint = cispo_tasks.tune_model(home, share, plan.learn_steps, plan.set_steps)
        # DAPO's sampling and length penalty belong to the published DAPO and CISPO.
        has_dapo_sampling = trial.table == "published" and trial.arm != "grpo"
        return rl_config.RlConfig(
            checkpoint=str(checkpoint),
            batches=plan.batches,
            sources=(rl_config.TaskSource("sums", str(home / "tasks.jsonl")),),
            rewards=rl_config.RewardsConfig(sources=(("sums", (("exact", 1.0, ()),)),), workers=1),
            rollout=rl_config.RolloutConfig(
                groups=plan.groups,
                group_size=plan.group_size,
                max_prompt_tokens=cispo_tasks.PROMPT_TOKENS,
                windows=rl_config.LengthSchedule((cispo_tasks.ANSWER_TOKENS,)),
                dynamic=has_dapo_sampling,
                overlong_buffer_tokens=4 if has_dapo_sampling else 0,
                engine=_ENGINE,
            ),
            update=rl_config.UpdateConfig(trial.rate, minibatches=trial.updates, rows=16),
            objective=ARMS[trial.table][trial.arm],
            dtype="float32",
            save=rl_config.SaveConfig(every_steps=10, keep=1),
            seed=trial.seed,
        )

    def _run(self, trial: Trial, config: rl_config.RlConfig) -> dict:
        """Train; return the config and the columns that `cispo_curves` reads."""
        self._num_runs += 1
        minutes = (time.monotonic() - self._start_secs) / 60
        tqdm.tqdm.write(
            f"[{minutes:.0f} min] run {self._num_runs} of this start: {trial}", sys.stderr
        )
        workdir = self._directory / self.plan.name / f"{trial}.run"
        failed = ""
        try:
            summary = rl_loop.run_rl_training(config, workdir)
        except FloatingPointError as error:  # an outcome: the rate was too high for this arm
            failed = str(error)
        else:
            if summary.stopped_by is not None:
                sys.exit(f"stopped in {trial}; the same command goes on")
        fork = cispo_tasks.fork_id(config.checkpoint)
        lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
        batches = [batch for batch in map(json.loads, lines) if batch["kind"] == "train"]
        clipped = [
            {token: counts for token, *counts in batch.get("most_clipped", [])} for batch in batches
        ]
        shutil.rmtree(workdir)
        return {
            "config": configlib.to_json(config),
            "failed": failed,
            # Over all samples, groups that dynamic sampling leaves out included.
            "rewards": [batch["reward_sampled"] for batch in batches],
            "tokens": [batch["tokens_sampled"] for batch in batches],
            "fork": [counts.get(fork, [0, 0]) for counts in clipped],
            "secs": [batch["batch_secs"] for batch in batches],
            "sampling_secs": [batch["sampling_secs"] for batch in batches],
            "pearson": [batch.get("pearson") for batch in batches],
        }


# Products in tiles of 8 rows: a sample's numbers do not depend on the samples beside it, and arms
# are paired exactly.
_ENGINE = (
    ("max_rows", 64),
    ("chunk_tokens", 16),
    ("prefill_tokens", (64, 256)),
    ("num_snapshots", 32),
    ("decode_steps", 8),
    ("matmul_tile", 8),
)


def run_section(lab: Lab, table: str, task: str, updates: int) -> cispo_report.Section:
    """Make one section's runs: tuning, the common rate, and each arm's own rate."""
    plan, arms = lab.plan, list(ARMS[table])

    def outcomes(arm: str, rate: float, seeds: tuple[int, ...]) -> list[cispo_curves.RunOutcome]:
        trials = [Trial(table, task, updates, rate, arm, seed) for seed in seeds]
        records = lab.curves(trials)
        for trial, record in records.items():
            curves[str(trial)] = record["rewards"]
            secs.extend(record["secs"])
        return [
            cispo_curves.measure_outcome(
                record["rewards"], record["tokens"], record["fork"], bool(record["failed"])
            )
            for record in records.values()
        ]

    curves: dict[str, list[float]] = {}
    secs: list[float] = []
    seeds = plan.tuning_seeds or plan.seeds
    # Arms innermost, so that the runs of a stopped plan can be compared.
    for seed, rate, arm in itertools.product(seeds, plan.rates, arms):
        lab.curves([Trial(table, task, updates, rate, arm, seed)])
    tuning = {arm: {rate: outcomes(arm, rate, seeds) for rate in plan.rates} for arm in arms}
    best = {arm: cispo_curves.best_rate(tuning[arm]) for arm in arms}
    common = plan.rates[0]
    return cispo_report.Section(
        table=table,
        task=task,
        updates=updates,
        measured=cispo_tasks.measure_fork(lab.home(task) / "tuned"),
        batches=plan.batches,
        common_rate=common,
        seeds=plan.seeds,
        tuning_seeds=plan.tuning_seeds,
        tuning=tuning,
        best_rates=best,
        common={arm: outcomes(arm, common, plan.seeds) for arm in arms},
        best={arm: outcomes(arm, best[arm], plan.seeds) for arm in arms},
        curves=curves,
        secs=secs,
    )


def plan_sections(plan: ExperimentPlan) -> list[tuple[str, str, int]]:
    """Return (table, task, updates) of each section, in the order in which they are made."""
    return [
        (table, task, updates)
        for table in plan.tables
        for task in (plan.tasks if table == "clip" else plan.tasks[:1])
        for updates in (plan.updates if table == "clip" else plan.published_updates)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    plan_flags = parser.add_mutually_exclusive_group(required=True)
    for name in PLANS:
        plan_flags.add_argument(f"--{name}", dest="plan", action="store_const", const=name)
    parser.add_argument("--dir", required=True, type=pathlib.Path, help="of models and results")
    parser.add_argument("--plot", type=pathlib.Path, help="a file for the curves")
    parser.add_argument("--rates", nargs="+", type=float, help="in place of the plan's")
    parser.add_argument("--batches", type=int, help="of a run, in place of the plan's")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        cispo_report.require_matplotlib()
    plan, directory = PLANS[arguments.plan], arguments.dir.resolve()
    if arguments.rates:
        plan = dataclasses.replace(plan, rates=tuple(arguments.rates))
    if arguments.batches:
        plan = dataclasses.replace(plan, batches=arguments.batches)
    lab, sections = Lab(plan, directory), []
    for table, task, updates in plan_sections(plan):
        section = run_section(lab, table, task, updates)
        print(cispo_report.format_section(section, cispo_tasks.count_parameters()), flush=True)
        sections.append(section)
        values = {
            "plan": dataclasses.asdict(plan),
            "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "jax": jax.__version__,
            "sections": [cispo_report.to_json(section) for section in sections],
        }
        (directory / f"{plan.name}.json").write_text(json.dumps(values, indent=1))
    print(f"all numbers: {directory / plan.name}.json")
    if arguments.plot is not None:
        cispo_report.plot_rewards(sections, arguments.plot)


if __name__ == "__main__":
    main()

"""Command: rehearse a whole run at its true size on this machine, before any chip is rented.

    python -m train.rehearse --config=configs/pretrain_m1_4k.py --topology=v5p:8x8x8
        [--set=FIELD=VALUE] [--model=m1|tiny|DIR] [--steps=2000] [--plans=DIR] [--compile]
        [--json=FILE]

It takes configs of pretraining, SFT and RL. No TPU is needed, and no weight is read. It does what
the run does on its hosts, for all of them: meshes of the slice's own torus, rows, lanes, schedules,
restarts, changes of stage. One page says what fails, what fits, what costs most, and what could not
be run here. The exit status is 1 if anything fails. Several slices are written "8 x v5e:16x16".
"""

import dataclasses
import json
import os
import sys
import time
from typing import Any

import jax
from absl import flags, logging

from m1_jax import command_help, local_path
from train import config as config_lib
from train.rehearsal import findings as findings_lib
from train.rehearsal import page, sampling, training
from train.rehearsal import setting as setting_lib


def run(rehearsal: setting_lib.RehearsalConfig) -> page.RehearsalResult:
    """Rehearse. What the run would refuse is a line that fails, not an error.

    Raises:
      ValueError, OSError: a config or a slice that does not exist.
    """
    started, started_cpu = time.perf_counter(), page.measure_cpu_secs()
    findings = findings_lib.FindingList()
    setting = setting_lib.open_setting(rehearsal, findings)
    if isinstance(setting.run_config, config_lib.TrainConfig):
        training.TrainRehearsal(setting, findings).run()
    else:
        sampling.RlRehearsal(setting, findings).run()
    num_workers = rehearsal.workers or os.cpu_count() or 1
    return page.RehearsalResult(
        config=rehearsal.config,
        place=setting.place_name,
        findings=findings,
        secs=time.perf_counter() - started,
        cpu_secs=page.measure_cpu_secs() - started_cpu,
        peak_bytes=page.measure_peak_bytes(num_workers),
    )


def main(_) -> None:
    values = flags.FLAGS
    if not values["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # JAX and XLA log much; the user may ask for it
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there stays free
    try:
        names = [field.name for field in dataclasses.fields(setting_lib.RehearsalConfig)]
        fields: dict[str, Any] = {name: getattr(values, name) for name in names}
        fields["set"] = tuple(values.set)  # absl gives a list
        result = run(setting_lib.RehearsalConfig(**fields))
        if values.json:
            local_path.resolve_path(values.json, "--json").write_text(
                json.dumps(result.to_json(), indent=1) + "\n"
            )
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was written")
    print(page.format_page(result))
    sys.exit(1 if result.findings.has_failed else 0)


def _define_flags() -> None:
    with command_help.flag_group("The run"):
        flags.DEFINE_string("config", None, "Config of the run, FILE or FILE:ARG.", required=True)
        flags.DEFINE_multi_string("set", [], "FIELD=VALUE in the config. May be repeated.")
        text = 'Slice, like v5p:8x8x8 or "8 x v5e:16x16". Default: one device.'
        flags.DEFINE_string("topology", "", text)
        text = "Shapes where the checkpoint is not here: m1, tiny, a config.json, its DIR."
        flags.DEFINE_string("model", "m1", text)
    with command_help.flag_group("How much to rehearse"):
        flags.DEFINE_integer("steps", 2000, "Steps of the data streams, over all stages.")
        text = "Mean length of stand-in documents, tokens. 0: 1,000, or a row's 16th part."
        flags.DEFINE_integer("document_tokens", 0, text)
        text = "Directory of m1-plan's records. Default: ~/.cache/m1_jax/plans."
        flags.DEFINE_string("plans", "", text)
        flags.DEFINE_bool("compile", False, "Run m1-plan where it has no record. Minutes for each.")
        flags.DEFINE_integer("workers", 0, "Processes that run lanes. 0: one for each core.")
    with command_help.flag_group("Output"):
        flags.DEFINE_string("json", "", "File to write all figures to.")


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()

"""What the data and the checkpoints of a training run cost its hosts, and how long chips wait."""

import dataclasses
from collections.abc import Mapping, Sequence

from m1_jax import flops
from train import metrics, run_setup
from train.data import config as data_config
from train.rehearsal import exchange, speed, storage
from train.rehearsal import findings as findings_lib
from train.rehearsal import hosts as hosts_lib
from train.rehearsal import lanes as lanes_lib
from train.rehearsal import setting as setting_lib

GIB, MIB = 2**30, 2**20
# jax's device_kind of the generations that slices are named by.
DEVICE_KINDS = {"v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "tpu7x": "TPU7x"}


@dataclasses.dataclass(frozen=True)
class DataCosts:
    """What was rehearsed of the data, and what it costs."""

    _setting: setting_lib.RehearsalSetting
    _setup: run_setup.TrainSetup
    _stage_hosts: Sequence[hosts_lib.StageHosts]
    _windows: Sequence[lanes_lib.StepWindow]
    _lane_run: lanes_lib.LaneRun
    _encoding: speed.EncodingSpeed
    _findings: findings_lib.FindingList

    def report(self, fingerprint: Mapping[str, list]) -> None:
        """Add all lines.

        Args:
          fingerprint: fingerprints of the sources' files that are on this machine.
        """
        self._findings.add(
            "assumes",
            "speed",
            f"{self._encoding.tokens_per_sec:,.0f} tokens a second and core, "
            f"{self._encoding.origin}; a step's seconds are extrapolated from it",
            tokens_per_sec=self._encoding.tokens_per_sec,
        )
        for index, stage in enumerate(self._stage_hosts):
            cost = speed.find_slowest_host(stage, self._encoding)
            step_secs = self._bound_step_secs(index)
            bound = f"; the step takes at least {step_secs:.2f} s" if step_secs else ""
            waiting = max(cost.step_secs - step_secs, 0.0) if step_secs else 0.0
            if step_secs and waiting:
                bound += ", so the chips wait for data"
            self._findings.add(
                "costs",
                "data",
                f"stage {index}: the slowest host makes {cost.made_rows} rows a step for its "
                f"{cost.held_rows} in {cost.step_secs:.2f} s ({cost.num_lanes} lanes, "
                f"{cost.num_workers} workers){bound}; {cost.batch_bytes / MIB:,.0f} MiB a batch, "
                f"up to {cost.ahead_bytes / GIB:.2f} GiB ahead",
                waiting,
                **dataclasses.asdict(cost),
                step_bound_secs=step_secs,
            )
            window_number = max(n for n, w in enumerate(self._windows) if w.stage_index == index)
            self._report_restart(index, stage)
            self._report_state(index, stage, window_number, fingerprint)
        self._report_evaluation()

    def _bound_step_secs(self, index: int) -> float:
        """Return the least seconds of a step, at the chips' peak. 0 where it is not known."""
        tpu_slice, stage = self._setting.tpu_slice, self._setup.config.stages[index]
        if tpu_slice is None:
            return 0.0
        peak = metrics.PEAK_FLOPS[DEVICE_KINDS[tpu_slice.generation]] * len(self._setting.devices)
        count = flops.count_train_flops(self._setup.model.config, stage.rows, stage.seq_len)
        return (count.model + count.recomputed) / peak

    def _report_restart(self, index: int, stage: hosts_lib.StageHosts) -> None:
        num_tokens, lanes_of_worker = speed.count_restart_tokens(
            stage, self._lane_run.pending_tokens[index]
        )
        secs = (
            lanes_of_worker * self._lane_run.pending_tokens[index] / self._encoding.tokens_per_sec
        )
        # 4 bytes of a token, and 1 of its mask.
        self._findings.add(
            "costs",
            "restart",
            f"stage {index}: a host encodes up to {num_tokens:,} pending tokens again, {secs:.1f} s"
            f" in all, and holds them in {5 * num_tokens / GIB:.2f} GiB",
            secs / max(self._setup.config.stages[index].num_steps, 1),
            pending_tokens=num_tokens,
            pending_secs=secs,
        )

    def _report_state(
        self,
        index: int,
        stage: hosts_lib.StageHosts,
        window_number: int,
        fingerprint: Mapping[str, list],
    ) -> None:
        gathered = exchange.count_data_state(stage, self._lane_run, window_number, fingerprint)
        self._findings.add(
            "costs",
            "exchange",
            f"stage {index}: no data passes between hosts in a step; at a save a host sends "
            f"{gathered.sent / 1024:,.1f} KiB and process 0 gets {gathered.received / 1024:,.1f}, "
            f"by the hosts' network; chips carry none of it; the checkpoint has "
            f"{gathered.merged / 1024:,.1f} KiB",
            **dataclasses.asdict(gathered),
        )

    def _report_evaluation(self) -> None:
        config = self._setup.config.evaluation
        if not config.every_steps:
            return
        for index, stage in enumerate(self._stage_hosts):
            with self._findings.catch_refusals("evaluation", f"stage {index}"):
                data = dataclasses.replace(
                    self._setup.config.data, sources=config.sources, weights=()
                )
                data_config.StreamConfig(
                    data, stage.stream_config.seq_len, stage.stream_config.rows
                )
            if not config.batches:
                continue
            num_rows = config.batches * stage.stream_config.rows
            secs = num_rows * stage.stream_config.seq_len / self._encoding.tokens_per_sec
            self._findings.add(
                "costs",
                "evaluation",
                f"stage {index}: every {config.every_steps} steps each host encodes all "
                f"{num_rows} held-out rows in one thread, {secs:.1f} s in which the chips wait",
                secs / config.every_steps,
                evaluation_secs=secs,
            )


def add_checkpoint(
    size: storage.CheckpointSize, label: str, keep: int, findings: findings_lib.FindingList
) -> None:
    """Add a line with a checkpoint's size."""
    findings.add(
        "costs",
        "checkpoint",
        f"{label}: {size.total_bytes / 1e12:.3f} TB in {size.num_arrays} arrays; "
        f"{size.num_writers} hosts write up to {size.host_bytes / GIB:.2f} GiB each, in "
        f"{size.num_files:,} files or more, the largest {size.largest_bytes / GIB:.2f} GiB; "
        f"{keep} are kept; a restart reads {size.restored_bytes / GIB:.2f} GiB on a host",
        **dataclasses.asdict(size),
    )


def add_unsized_adapters(findings: findings_lib.FindingList) -> None:
    """Add a line for a run of LoRA on a slice."""
    findings.add(
        "assumes",
        "checkpoint",
        "the run trains adapters: neither its checkpoint nor its programs were sized",
    )

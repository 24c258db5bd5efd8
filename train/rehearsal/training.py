"""Rehearses a run of pretraining or fine-tuning: all stages, on all hosts."""

import pathlib
import tempfile
from collections.abc import Mapping

import numpy as np

from m1_jax.plan import config as plan_config
from train import config as config_lib
from train import run_setup
from train.data import records as records_lib
from train.rehearsal import costs, programs, schedules, speed, storage, streams
from train.rehearsal import documents as documents_lib
from train.rehearsal import findings as findings_lib
from train.rehearsal import hosts as hosts_lib
from train.rehearsal import lanes as lanes_lib
from train.rehearsal import setting as setting_lib

GIB, MIB = 2**30, 2**20
_RECORDS_PER_STEP = 0.5  # of the documents that are read: every source is read about twice
_MAX_RECORDS = 200_000


class TrainRehearsal:
    """One rehearsal. Each part adds its lines, and a refusal stops its own part alone."""

    def __init__(self, setting: setting_lib.RehearsalSetting, findings: findings_lib.FindingList):
        assert isinstance(setting.run_config, config_lib.TrainConfig)
        self._config: config_lib.TrainConfig = setting.run_config
        self._setting, self._findings = setting, findings
        layouts = []
        for index, stage in enumerate(self._config.stages):
            with findings.catch_refusals("mesh", f"stage {index}"):
                layouts.append(
                    run_setup.make_stage_layout(stage, setting.model.config, setting.devices)
                )
        # With a stage that is refused nothing else can be rehearsed truly.
        self._setup = None
        if len(layouts) == len(self._config.stages):
            self._setup = run_setup.TrainSetup(self._config, setting.model, tuple(layouts))

    def run(self) -> None:
        """Rehearse all parts."""
        if self._setup is None:
            return
        for index in range(len(self._config.stages)):
            with self._findings.catch_refusals("schedules", f"stage {index}"):
                schedules.check_stage_rates(self._setup, index, self._findings)
        stage_hosts = self._place_rows(self._setup)
        records = self._open_files()
        if len(stage_hosts) == len(self._config.stages):
            self._rehearse_data(self._setup, stage_hosts, records)
        self._measure_storage(self._setup)
        self._check_programs(self._setup)

    def _place_rows(self, setup: run_setup.TrainSetup) -> list[hosts_lib.StageHosts]:
        stage_hosts = []
        for index, layout in enumerate(setup.layouts):
            with self._findings.catch_refusals("placement", f"stage {index}"):
                hosts = hosts_lib.find_stage_hosts(
                    self._config, index, layout, setup.first_step(index)
                )
                stage_hosts.append(hosts)
                held = [len(rows) for rows in hosts.rows_by_process.values()]
                fewest, most = hosts_lib.count_sharing_hosts(hosts)
                lanes = [len(hosts.lanes_of(process)) for process in hosts.rows_by_process]
                self._findings.add(
                    "fits",
                    "placement",
                    f"stage {index}: {hosts.stream_config.rows} rows of "
                    f"{hosts.stream_config.seq_len:,} tokens; {len(held)} hosts hold "
                    f"{_format_range(min(held), max(held))} rows each, a row lies on "
                    f"{_format_range(fewest, most)} hosts; a host runs "
                    f"{_format_range(min(lanes), max(lanes))} of {self._config.data.lanes} lanes",
                    rows_by_process={p: list(r) for p, r in hosts.rows_by_process.items()},
                )
        return stage_hosts

    def _open_files(self) -> dict[str, records_lib.RecordFiles]:
        """Return the config's files that are on this machine, and check held-out ones, too."""
        opened = {}
        held_out = [(s, False) for s in self._config.evaluation.sources]
        for source, is_trained in [*((s, True) for s in self._config.data.sources), *held_out]:
            with self._findings.catch_refusals("data", f"source {source.name}"):
                files = documents_lib.open_records(source)
                if files is None:
                    self._findings.add(
                        "assumes",
                        "data",
                        f"source {source.name}: no file at {source.path} on this machine",
                    )
                    continue
                text = f"source {source.name}: {len(files):,} records opened"
                self._findings.add("fits", "data", text, records=len(files))
                if is_trained:
                    opened[source.name] = files
        return opened

    def _rehearse_data(
        self,
        setup: run_setup.TrainSetup,
        stage_hosts: list[hosts_lib.StageHosts],
        records: dict[str, records_lib.RecordFiles],
    ) -> None:
        encoding = None
        longest = max(stage.seq_len for stage in self._config.stages)
        tokenizer = self._setting.model.tokenizer if self._setting.has_tokenizer else None
        with self._findings.catch_refusals("data"):
            encoding = speed.measure_encoding(self._config.data, longest, records, tokenizer)
            _check_lengths(self._config, encoding.lengths)
        if encoding is None:
            return
        self._report_bad_records(encoding)
        fingerprint = {name: files.fingerprint() for name, files in records.items()}
        windows = lanes_lib.plan_windows(
            [(h.stream_config, h.first_step, h.num_steps) for h in stage_hosts],
            self._setting.rehearsal.steps,
        )
        sources = self._make_sources(windows, records, encoding)
        lane_run = None
        with self._findings.catch_refusals("data"):
            lane_run = lanes_lib.run_lanes(windows, sources, self._setting.rehearsal.workers)
        if lane_run is None:
            return
        self._report_lanes(windows, lane_run)
        with self._findings.catch_refusals("data"), tempfile.TemporaryDirectory() as directory:
            check = streams.check_streams(
                windows, stage_hosts, sources, lane_run, pathlib.Path(directory)
            )
            for error in check.errors[:5]:
                self._findings.add("fails", "data", error)
            if not check.errors:
                self._findings.add(
                    "fits",
                    "data",
                    f"{check.num_streams} streams of sampled hosts, restarted in {len(windows)} "
                    f"places and on another number of hosts: {check.num_rows} rows bit for bit "
                    "those of the lanes",
                )
        costs.DataCosts(
            self._setting, setup, stage_hosts, windows, lane_run, encoding, self._findings
        ).report(fingerprint)

    def _report_bad_records(self, encoding: speed.EncodingSpeed) -> None:
        for name, errors in encoding.bad_records.items():
            num_sampled = len(errors) + len(encoding.lengths[name])
            self._findings.add(
                "costs",
                "data",
                f"source {name}: {len(errors)} of {num_sampled} sampled records are bad and left "
                f"out (bad_records='skip'). The first: {errors[0]}",
                bad_records=len(errors),
            )

    def _make_sources(
        self,
        windows: list[lanes_lib.StepWindow],
        records: Mapping[str, records_lib.RecordFiles],
        encoding: speed.EncodingSpeed,
    ) -> dict[str, documents_lib.StandInSource]:
        """Return records for all sources, few enough that the steps read them about twice."""
        data = self._config.data
        longest = max(stage.seq_len for stage in self._config.stages)
        shortest = min(stage.seq_len for stage in self._config.stages)
        mean = self._setting.rehearsal.document_tokens or max(
            documents_lib.DEFAULT_MEAN_TOKENS, longest // 16
        )
        places = sum(w.config.rows * w.config.seq_len * len(w.steps) for w in windows)
        share = _RECORDS_PER_STEP / len(data.sources)
        sources = {}
        for source in data.sources:
            is_chat, lengths = source.kind == "chat", encoding.lengths.get(source.name)
            # A conversation beyond the row is refused or left out. Some are where they may be.
            whole = is_chat and data.overlong == "error"
            max_tokens = max(shortest - 64, 8) if whole else 4 * longest
            source_mean = min(mean, shortest / 2) if is_chat else mean
            typical = source_mean if lengths is None else float(np.mean(lengths))
            num_records = int(np.clip(share * places / typical, 2 * data.lanes, _MAX_RECORDS))
            sources[source.name] = documents_lib.make_stand_in_source(
                source, num_records, source_mean, max_tokens, self._config.seed, lengths
            )
            origin = (
                f"log-normal, mean {source_mean:,.0f} tokens (--document_tokens)"
                if lengths is None
                else f"of {len(lengths)} sampled records, mean {typical:,.0f} tokens"
            )
            self._findings.add(
                "assumes",
                "data",
                f"source {source.name}: streams ran on {num_records:,} stand-in records, lengths "
                f"{origin}",
            )
        return sources

    def _report_lanes(
        self, windows: list[lanes_lib.StepWindow], lane_run: lanes_lib.LaneRun
    ) -> None:
        for error in lane_run.errors[:5]:
            self._findings.add("fails", "data", error)
        num_steps = sum(len(window.steps) for window in windows)
        num_rows, num_tokens = sum(lane_run.num_rows.values()), sum(lane_run.num_tokens.values())
        if not lane_run.errors:
            self._findings.add(
                "fits",
                "data",
                f"{self._config.data.lanes} lanes over {num_steps:,} steps: {num_rows:,} rows, "
                f"{num_tokens / 1e9:,.2f}B tokens, {len(lane_run.documents):,} documents, none "
                f"lost or read twice; {len(windows) - 1} restarts",
                steps=num_steps,
                rows=num_rows,
                tokens=num_tokens,
            )
        for stage, places in lane_run.num_places.items():
            share = lane_run.num_tokens.get(stage, 0) / places
            if share < 0.9:
                text = f"stage {stage}: only {share:.0%} of the computed places hold a token"
                self._findings.add("costs", "data", text, utilisation=share)
        if lane_run.num_dropped:
            share = lane_run.num_dropped / lane_run.num_read.sum()
            text = f"{share:.1%} of the stand-in conversations are longer than a row and left out"
            self._findings.add("costs", "data", text, dropped_share=share)

    def _measure_storage(self, setup: run_setup.TrainSetup) -> None:
        if self._setting.has_unsized_adapters:
            costs.add_unsized_adapters(self._findings)
            return
        for index, layout in enumerate(setup.layouts):
            if index and layout == setup.layouts[index - 1]:
                continue
            with self._findings.catch_refusals("checkpoint", f"stage {index}"):
                optimizer = setup.step_settings(index).optimizer
                state = setup.model.abstract_state(layout, optimizer)
                size = storage.measure_checkpoint(state, self._config.save.directory)
                costs.add_checkpoint(size, f"stage {index}", self._config.save.keep, self._findings)

    def _check_programs(self, setup: run_setup.TrainSetup) -> None:
        name, tpu_slice = programs.name_model(self._setting), self._setting.tpu_slice
        if tpu_slice is None or self._setting.has_unsized_adapters:
            return
        seen = set()
        for index, (stage, layout) in enumerate(
            zip(self._config.stages, setup.layouts, strict=True)
        ):
            if layout is None:
                continue
            plan = plan_config.PlanConfig(
                topology=tpu_slice.name,
                slices=tpu_slice.num_slices,
                job="train",
                config=name or "m1",
                mesh=programs.format_mesh(layout),
                seq=stage.seq_len,
                batch=stage.rows,
                accumulate=stage.accumulate,
                remat=setup.model.config.remat,
                lightning=setup.model.config.lightning_implementation,
            )
            if plan in seen:
                continue
            seen.add(plan)
            with self._findings.catch_refusals("programs", f"stage {index}"):
                program = programs.PlannedProgram(f"step of stage {index}", plan, layout)
                programs.check_program(program, self._setting, self._findings)


def _check_lengths(config: config_lib.TrainConfig, lengths: Mapping[str, np.ndarray]) -> None:
    """Refuse conversations of a sample that the run would refuse as too long.

    Raises:
      DataError: there is one.
    """
    shortest = min(stage.seq_len for stage in config.stages)
    for source in config.data.sources:
        if config.data.overlong != "error" or source.kind != "chat":
            continue
        longest = int(max(lengths.get(source.name, np.zeros(1)), default=0))
        if longest > shortest:
            raise records_lib.DataError(
                f"source {source.name}: got a conversation of {longest} tokens; wanted at most "
                f"{shortest}. Choose overlong='drop' or 'split', or longer rows."
            )


def _format_range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"

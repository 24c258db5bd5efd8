"""Rehearses a run of reinforcement learning: tasks, engine, generation batches, updates, saves."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from m1_jax import params as params_lib
from m1_jax import sharding
from m1_jax.plan import config as plan_config
from m1_jax.plan import shapes
from m1_jax.serving import state as serving_state
from train.data import config as data_config
from train.rehearsal import answers, costs, documents, programs, schedules, storage
from train.rehearsal import findings as findings_lib
from train.rehearsal import setting as setting_lib
from train.rl import config as rl_config
from train.rl import loop as rl_loop
from train.rl import rollout_setup
from train.rl import tasks as tasks_lib

GIB, MIB = 2**30, 2**20
_MADE_TASKS = 4  # tasks of a generator that are made, to extrapolate from
_LOW_UTILISATION = 0.75


class RlRehearsal:
    """One rehearsal. Each part adds its lines, and a refusal stops its own part alone."""

    def __init__(self, setting: setting_lib.RehearsalSetting, findings: findings_lib.FindingList):
        assert isinstance(setting.run_config, rl_config.RlConfig)
        self._config: rl_config.RlConfig = setting.run_config
        self._setting, self._findings = setting, findings

    def run(self) -> None:
        """Rehearse all parts."""
        config, findings = self._config, self._findings
        num_updates = config.batches * config.update.minibatches * config.update.epochs
        with findings.catch_refusals("schedules"):
            schedules.check_rl_rates(rl_loop.make_optimizer(config), num_updates, findings)
        held_out_sizes = self._open_tasks(config.evaluation.sources, "held-out tasks")
        self._open_tasks(config.sources, "tasks")
        layouts = None
        with findings.catch_refusals("mesh"):
            layouts = rl_loop.make_layouts(
                config, self._setting.model.config, self._setting.devices
            )
            sharding.check_batch_rows(layouts[0], config.update.rows)
            self._check_row_length(layouts[0])
        with findings.catch_refusals("batch"):
            self._measure_batch()
        engine = None
        with findings.catch_refusals("engine"):
            engine = rollout_setup.make_run_engine_config(config, held_out_sizes)
            self._describe_engine(engine)
        if layouts is None:
            return
        layout, serving_layout = layouts
        state = None
        with findings.catch_refusals("checkpoint"):
            state = self._setting.model.abstract_state(layout, rl_loop.make_optimizer(config))
            size = storage.measure_checkpoint(state, config.save.directory)
            costs.add_checkpoint(size, "state", config.save.keep, findings)
        if layout is None or serving_layout is None:
            return
        with findings.catch_refusals("engine"):
            self._measure_residents(state, serving_layout, engine)
        self._check_programs(layout)

    @property
    def _row_tokens(self) -> int:
        return self._config.update.row_tokens or self._config.rollout.max_sample_tokens

    # ---- tasks

    def _open_tasks(self, sources: Sequence[tasks_lib.TaskSource], label: str) -> Any:
        """Open files, and make a few tasks of each generator. Return ranges as long as sources."""
        sizes: dict[str, range] = {}
        total_secs = 0.0
        for source in sources:
            sizes[source.name] = range(source.size)
            with self._findings.catch_refusals("tasks", source.name):
                if source.path:
                    sizes[source.name] = range(self._open_file_tasks(source))
                else:
                    total_secs += self._make_some_tasks(source)
        if total_secs > 1:
            num_tasks = sum(source.size for source in sources if source.make)
            self._findings.add(
                "costs",
                "tasks",
                f"{num_tasks:,} {label} of {sum(bool(s.make) for s in sources)} generators take "
                f"{total_secs / 60:.1f} minutes of one core at the start, by {_MADE_TASKS} of each",
                total_secs / self._config.batches,
                start_secs=total_secs,
            )
        return sizes

    def _open_file_tasks(self, source: tasks_lib.TaskSource) -> int:
        if documents.open_records(data_config.DataSource(source.name, source.path)) is None:
            text = f"source {source.name}: no file at {source.path} on this machine"
            self._findings.add("assumes", "tasks", text)
            return 0
        tasks = tasks_lib.open_task_source(source)
        first = tasks[0]
        text = f"source {source.name}: {len(tasks):,} tasks opened, the first is {first.id}"
        self._findings.add("fits", "tasks", text)
        tasks.close()
        return len(tasks)

    def _make_some_tasks(self, source: tasks_lib.TaskSource) -> float:
        """Return the seconds that all tasks of a generator take."""
        few = dataclasses.replace(source, size=min(source.size, _MADE_TASKS))
        started = time.process_time()
        try:
            tasks = tasks_lib.open_task_source(few)
        except ImportError as error:
            raise ValueError(f"{error}") from None
        secs = time.process_time() - started
        text = f"source {source.name}: {len(tasks)} of {source.size:,} tasks made"
        self._findings.add("fits", "tasks", text)
        return secs / len(tasks) * source.size

    # ---- sizes

    def _check_row_length(self, layout: sharding.MeshLayout | None) -> None:
        """Refuse rows that the update could not put onto the mesh."""
        if layout is None:
            return
        shards = layout.axis_size("length")
        if self._row_tokens % shards:
            raise ValueError(
                f"update.row_tokens: got rows of {self._row_tokens} tokens over context={shards}; "
                f"wanted a multiple of {shards}, such as {-(-self._row_tokens // shards) * shards}"
            )
        rows = self._config.update.rows
        shape = layout.activation_sharding("batch", "length").shard_shape((rows, self._row_tokens))
        self._findings.add(
            "fits",
            "placement",
            f"a microbatch of {rows} rows of {self._row_tokens:,} tokens gives a chip "
            f"{shape[0]} x {shape[1]:,}",
        )

    def _measure_batch(self) -> None:
        """Measure a generation batch on the host, at its longest, and how its rows are filled."""
        config = self._config
        sizes = answers.BatchSizes.of_config(config, self._setting.model.config, self._row_tokens)
        cost = answers.measure_batch(sizes)
        num_batches = max(config.save.every_steps, 1)
        self._findings.add(
            "costs",
            "batch",
            f"{sizes.num_samples} answers of {sizes.answer_tokens:,} tokens: "
            f"{cost.object_bytes / GIB:.1f} GiB of samples and {cost.row_bytes / GIB:.1f} GiB of "
            f"rows on each host; {cost.sent_bytes / GIB:.2f} GiB to every host; the chips wait "
            f"{cost.pack_secs:.0f} s for packing, {cost.encode_secs:.0f} s for encoding and "
            f"{cost.decode_secs:.0f} s for decoding them",
            cost.pack_secs + cost.encode_secs + cost.decode_secs,
            **dataclasses.asdict(cost),
        )
        self._findings.add(
            "assumes",
            "batch",
            f"a generation batch was measured on {sizes.scaled_tokens:,} of its "
            f"{sizes.num_tokens:,} tokens; seconds are those of one core here",
        )
        if config.rollout.partial_tokens:
            saved = cost.state_bytes_per_token * config.rollout.partial_tokens * sizes.num_samples
            self._findings.add(
                "costs",
                "save",
                f"{sizes.num_samples} unfinished answers of {config.rollout.partial_tokens:,} "
                f"tokens are {saved / GIB:.1f} GiB of a checkpoint's JSON",
                cost.state_secs_per_token
                * config.rollout.partial_tokens
                * sizes.num_samples
                / num_batches,
            )
        self._measure_utilisation(sizes)

    def _measure_utilisation(self, sizes: answers.BatchSizes) -> None:
        shares = answers.measure_utilisation(sizes, self._config)
        text = ", ".join(f"{share:.0%} at {mean:,}" for mean, share in shares.items())
        is_low = min(shares.values(), default=1) < _LOW_UTILISATION
        self._findings.add(
            "costs" if is_low else "fits",
            "batch",
            f"places of the update's rows that hold a token, by the mean answer: {text}",
            utilisation=shares,
        )

    def _describe_engine(self, engine: Any) -> None:
        num_samples = round(self._config.rollout.groups * self._config.rollout.oversample)
        num_samples *= self._config.rollout.group_size
        page_tokens, most = engine.total_pages * engine.chunk_tokens, engine.max_rows
        full_rows = min(page_tokens // engine.max_length, most)
        waves = -(-num_samples // max(full_rows, 1))
        window = self._config.rollout.windows.tokens[-1]
        self._findings.add(
            "fits",
            "engine",
            f"{most} rows, {engine.total_pages:,} pages of {engine.chunk_tokens} tokens: room for "
            f"{full_rows} answers at their longest; {num_samples} answers are up to {waves} waves "
            f"of {window:,} steps",
            waves=waves,
            full_rows=full_rows,
        )

    def _measure_residents(
        self, state: Any, serving_layout: sharding.MeshLayout, engine: Any
    ) -> None:
        """Add up what lies on a chip all the time, and compare with its memory."""
        model_config = self._setting.model.config
        sampler = params_lib.abstract_model(
            model_config, self._setting.model.dtype, self._setting.model.dtype, serving_layout
        )
        parts = {"sampler": shapes.local_bytes(sampler)}
        if state is not None:
            sized = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding is not None]
            parts["trainer"] = shapes.local_bytes(sized)
        if engine is not None:
            pools = serving_state.abstract_serving_state(
                model_config,
                engine.total_slots,
                engine.total_pages,
                engine.chunk_tokens,
                serving_layout,
            )
            parts["requests"] = shapes.local_bytes(pools)
        text = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        total = sum(parts.values())
        limit = programs.probe_limit_bytes(self._setting.devices[0])
        self._findings.add(
            "fits" if total <= limit else "fails",
            "engine",
            f"{total / GIB:.1f} of {limit / GIB:.1f} GiB of a chip hold weights, moments and "
            f"requests all the time: {text}",
            **{f"{name}_bytes": size for name, size in parts.items()},
        )

    def _check_programs(self, layout: sharding.MeshLayout) -> None:
        tpu_slice = self._setting.tpu_slice
        if tpu_slice is None:
            return
        sizes = {axis: size for axis, size in self._config.serving_mesh if size > 1}
        serving = programs.report_lib.format_mesh(sizes or {"expert": layout.mesh.size})
        for job, label in (("rl_update", "scores, gradients, update"), ("reshard", "weight sync")):
            plan = plan_config.PlanConfig(
                topology=tpu_slice.name,
                slices=tpu_slice.num_slices,
                job=job,
                config=programs.name_model(self._setting) or "m1",
                mesh=programs.format_mesh(layout),
                serving_mesh=serving,
                seq=self._row_tokens,
                batch=self._config.update.rows,
                remat=self._setting.model.config.remat,
            )
            with self._findings.catch_refusals("programs", label):
                program = programs.PlannedProgram(label, plan, layout)
                programs.check_program(program, self._setting, self._findings)

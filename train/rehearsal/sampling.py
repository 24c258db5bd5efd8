"""Rehearses a run of reinforcement learning: tasks, engine, generation batches, updates, saves."""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from m1_jax import params as params_lib
from m1_jax import sharding
from m1_jax.plan import config as plan_config
from m1_jax.plan import estimate, meshes
from m1_jax.plan import shapes as shapes_lib
from m1_jax.serving import state as serving_state
from train.data import config as data_config
from train.rehearsal import answers, costs, documents, engine_calls, programs, schedules, storage
from train.rehearsal import findings as findings_lib
from train.rehearsal import setting as setting_lib
from train.rl import config as rl_config
from train.rl import loop as rl_loop
from train.rl import rollout_setup, row_packing, task_checks, task_json, task_maker
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
        layouts = row_shapes = None
        with findings.catch_refusals("mesh"):
            layouts = rl_loop.make_layouts(
                config, self._setting.model.config, self._setting.devices
            )
            row_shapes = self._make_row_shapes(layouts[0])
            self._check_rows(layouts[0], row_shapes)
        if layouts is not None and row_shapes is not None:
            with findings.catch_refusals("batch"):
                self._measure_batch(layouts[0], row_shapes)
        engine = None
        with findings.catch_refusals("engine"):
            engine = rollout_setup.make_run_engine_config(config, held_out_sizes)
            self._describe_engine(engine)
        if layouts is None:
            return
        layout, serving_layout = layouts
        state = None
        if self._setting.has_unsized_adapters:
            costs.add_unsized_adapters(findings)
            return
        with findings.catch_refusals("checkpoint"):
            state = self._setting.model.abstract_state(layout, rl_loop.make_optimizer(config))
            size = storage.measure_checkpoint(state, config.save.directory)
            costs.add_checkpoint(size, "state", config.save.keep, findings)
        if layout is None or serving_layout is None:
            return
        with findings.catch_refusals("engine"):
            self._measure_residents(state, serving_layout, engine)
        if row_shapes is not None:
            self._check_programs(layout, row_shapes.largest)

    def _make_row_shapes(self, layout: sharding.MeshLayout | None) -> row_packing.RowShapes:
        """Return the shapes of microbatches, as `update.PolicyUpdater` makes them."""
        update, rollout = self._config.update, self._config.rollout
        longest = update.row_tokens or rollout.max_sample_tokens
        return row_packing.make_row_shapes(update.rows, longest, layout)

    # ---- tasks

    def _open_tasks(self, sources: Sequence[tasks_lib.TaskSource], label: str) -> Any:
        """Check tasks: all of files, a few of generators. Return ranges as long as the sources."""
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
                f"{num_tasks:,} {label} that are generated take process 0 {total_secs / 60:.1f} "
                f"minutes of one core, once in a run, by {_MADE_TASKS} of each source",
                total_secs / self._config.batches,
                start_secs=total_secs,
            )
        return sizes

    def _open_file_tasks(self, source: tasks_lib.TaskSource) -> int:
        if documents.open_records(data_config.DataSource(source.name, source.path)) is None:
            text = f"source {source.name}: no file at {source.path} on this machine"
            self._findings.add("assumes", "tasks", text)
            return 0
        with contextlib.closing(tasks_lib.FileTasks(source)) as tasks:
            environment = self._environment
            task_checks.check_needs(tasks, source.name, self._config.rewards, environment)
            text = f"source {source.name}: {len(tasks):,} tasks opened, the first is {tasks[0].id}"
            self._findings.add("fits", "tasks", text)
            return self._count_short_tasks(source, tasks)

    @property
    def _environment(self) -> str | None:
        return self._config.agent.environment if self._config.agent else None

    def _count_short_tasks(self, source: tasks_lib.TaskSource, tasks: tasks_lib.FileTasks) -> int:
        """Return how many tasks stay, with the run's own refusal of prompts that are too long."""
        if not self._setting.has_tokenizer:
            return len(tasks)
        tokenizer, max_tokens = (
            self._setting.model.tokenizer,
            self._config.rollout.max_prompt_tokens,
        )
        with tempfile.TemporaryDirectory() as directory:
            short_tasks = rollout_setup.check_prompts(
                source, tasks, tokenizer, max_tokens, pathlib.Path(directory)
            )
        if num_long := len(tasks) - len(short_tasks):
            text = (
                f"source {source.name}: {num_long:,} of {len(tasks):,} tasks are left out, whose "
                f"prompts have more than {max_tokens:,} tokens"
            )
            self._findings.add("costs", "tasks", text, dropped=num_long)
        return len(short_tasks)

    def _make_some_tasks(self, source: tasks_lib.TaskSource) -> float:
        """Return the seconds of one core that all tasks of a generator take."""
        recipe, options = tasks_lib.describe_source(source), dict(source.options)
        # Tasks may get harder on the way.
        last = source.size - 1
        indices = sorted({last * i // (_MADE_TASKS - 1) for i in range(_MADE_TASKS)})
        task_maker.check_recipe(recipe, options)
        times, tasks = [], []
        for _, line in task_maker.make_task_lines(recipe, options, indices, num_processes=1):
            times.append(time.perf_counter())
            tasks.append(task_json.task_from_line(line, source.name))
        checks = task_checks.find_checks(source.name, self._config.rewards, self._environment)
        task_checks.check_tasks(tasks, source.name, checks, lambda n: f"task {tasks[n].id}")
        text = f"source {source.name}: {len(times)} of {source.size:,} tasks made"
        self._findings.add("fits", "tasks", text)
        # From the first on: before it the process starts.
        return (times[-1] - times[0]) / max(len(times) - 1, 1) * source.size

    # ---- sizes

    def _check_rows(
        self, layout: sharding.MeshLayout | None, shapes: row_packing.RowShapes
    ) -> None:
        """Lay the rows of all shapes onto the mesh, with the update's own refusals."""
        if layout is None:
            return
        placed = layout.activation_sharding("batch", "length")
        for num_rows in shapes.row_counts:
            for row_tokens in shapes.row_lengths:
                placed.shard_shape((num_rows, row_tokens))
        parts = placed.shard_shape(tuple(shapes.largest))
        num_shapes = len(shapes.row_counts) * len(shapes.row_lengths)
        self._findings.add(
            "fits",
            "placement",
            f"a microbatch of {shapes.largest.num_rows} rows of {shapes.largest.row_tokens:,} "
            f"tokens gives a chip {parts[0]} x {parts[1]:,}; {num_shapes} smaller shapes fit, too",
        )

    def _measure_batch(
        self, layout: sharding.MeshLayout | None, shapes: row_packing.RowShapes
    ) -> None:
        """Measure a generation batch on the host, at its longest, and how its rows are filled."""
        config = self._config
        sizes = answers.BatchSizes.of_config(config, self._setting.model.config, shapes, layout)
        cost = answers.measure_batch(sizes)
        sent = cost.sample_bytes if self._setting.num_hosts > 1 else 0
        chip = sent / max(len(self._setting.devices) // self._setting.num_hosts, 1)
        self._findings.add(
            "costs",
            "batch",
            f"{sizes.num_samples} answers of {sizes.answer_tokens:,} tokens: "
            f"{cost.sample_bytes / GIB:.2f} GiB of samples on each host, and "
            f"{cost.row_bytes / GIB:.2f} of its part of the largest microbatch; every host gets "
            f"{sent / GIB:.2f} GiB through its chips, {chip / GIB:.2f} each in blocks of 64 MiB, "
            f"and {cost.table_bytes / 2**20:.2f} MiB by the hosts' network; the chips wait "
            f"{cost.encode_secs + cost.decode_secs:.1f} s for columns and {cost.row_secs:.1f} s "
            "for rows",
            cost.encode_secs + cost.decode_secs + cost.row_secs,
            **dataclasses.asdict(cost),
        )
        self._findings.add(
            "assumes",
            "batch",
            f"a generation batch was measured on {sizes.scaled_tokens:,} of its "
            f"{sizes.num_tokens:,} tokens; seconds are those of one core here",
        )
        if config.rollout.partial_tokens:
            carried = config.rollout.partial_tokens * sizes.num_samples
            saved_bytes = cost.carried_bytes_per_token * carried
            self._findings.add(
                "costs",
                "checkpoint",
                f"{sizes.num_samples} unfinished answers of {config.rollout.partial_tokens:,} "
                f"tokens are {saved_bytes / GIB:.2f} GiB of process 0's file of columns",
                saved_bytes=saved_bytes,
            )
        self._measure_utilisation(sizes)

    def _measure_utilisation(self, sizes: answers.BatchSizes) -> None:
        shares = answers.measure_utilisation(sizes, self._config.seed)
        text = ", ".join(
            f"{scored:.0%} and {updated:.0%} at {mean:,}"
            for mean, (scored, updated) in shares.items()
        )
        is_low = min(map(min, shares.values())) < _LOW_UTILISATION
        self._findings.add(
            "costs" if is_low else "fits",
            "batch",
            "places of rows that hold a token, in scoring and in updates, by the mean answer: "
            f"{text}",
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
        num_hosts = self._setting.num_hosts
        if num_hosts > 1:
            call = engine_calls.measure_decode_call(engine)
            self._findings.add(
                "costs",
                "engine",
                f"process 0 tells {num_hosts - 1} hosts of each decode program, which makes up to "
                f"{engine.decode_steps} tokens a row: {call.call_bytes:,} bytes a host in "
                f"{1e3 * call.encode_secs:.1f} ms, and {call.first_bytes:,} for the first one",
                **dataclasses.asdict(call),
            )

    def _measure_residents(
        self, state: Any, serving_layout: sharding.MeshLayout, engine: Any
    ) -> None:
        """Add up what lies on a chip all the time, and compare with its memory."""
        model_config = self._setting.model.config
        sampler = params_lib.abstract_model(
            model_config, self._setting.model.dtype, self._setting.model.dtype, serving_layout
        )
        job = estimate.PlanJob("serve", self._config.rollout.max_sample_tokens, 1)
        padded = meshes.describe_padded_columns(model_config, job, serving_layout, sampler)
        programs.add_warnings("sampler", padded, self._findings)
        parts = {"sampler": shapes_lib.local_bytes(sampler)}
        if state is not None:
            sized = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding is not None]
            parts["trainer"] = shapes_lib.local_bytes(sized)
        if engine is not None:
            share = engine.split(serving_layout.axis_size("batch"))
            pools = serving_state.abstract_serving_state(
                model_config,
                share.total_slots,
                share.total_pages,
                share.chunk_tokens,
                serving_layout,
            )
            parts["requests"] = shapes_lib.local_bytes(pools)
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

    def _check_programs(
        self, layout: sharding.MeshLayout, largest: row_packing.MicrobatchShape
    ) -> None:
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
                seq=largest.row_tokens,
                batch=largest.num_rows,
                remat=self._setting.model.config.remat,
                lightning=self._setting.model.config.lightning_implementation,
            )
            with self._findings.catch_refusals("programs", label):
                program = programs.PlannedProgram(label, plan, layout)
                programs.check_program(program, self._setting, self._findings)

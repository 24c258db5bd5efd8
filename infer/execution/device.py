"""The device's side of an engine: its memory, its programs, and nothing that decides.

Whatever happens on the device is one of the calls of `Device`, with host arrays as arguments and in
one order: that is what other processes of a mesh repeat (`execution/leader_follower.py`).
"""

import concurrent.futures
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from infer import config as config_lib
from infer.execution import host_batch, programs, transfers
from m1_jax import state as state_lib

# What a program takes of the device's memory, and which of it it gives back first.
_TAKES = {
    "decode": ("model", "state", "rows"),
    "verify": ("model", "state", "rows"),
    "prefill": ("model", "state", "rows"),
    "copy": ("state",),
    "read": ("state",),
    "read_routes": ("state",),
    "write": ("state",),
    "read_row": ("rows",),
    "write_row": ("rows",),
    "reset": ("rows",),
    "count": ("rows",),
    "set_mask": ("rows",),
}
_ONLY_READ = ("read", "read_row", "read_routes")


class Device:
    """Memory and compiled programs.

    Attributes:
      state_bytes, page_bytes: of one slot and one page, on all devices together.
      num_programs: compiled.
    """

    def __init__(self, model: Any, config: config_lib.EngineConfig):
        """Allocate and compile."""
        leaves, self._tree = jax.tree.flatten(model)
        layout = model.layout
        self._replicated_sharding = (
            None if layout is None else NamedSharding(layout.mesh, PartitionSpec())
        )
        state = state_lib.init_serving_state(
            model.config,
            config.total_slots,
            config.total_pages,
            config.chunk_tokens,
            model.dtype,
            layout,
            config.record_routes,
        )
        rows = jax.jit(
            programs.init_sampling_state,
            static_argnums=(0, 1),
            out_shardings=self._replicated_sharding,
        )(config.total_slots, model.config.vocab_size)
        self._buffers: dict[str, Any] = {"model": leaves, "state": state, "rows": rows}
        self._host_copies: dict[Hashable, list[Any]] = {}
        slots, pages = (
            [x for x in state.layers if isinstance(x, kind)]
            for kind in (state_lib.LightningSlots, state_lib.PagedKVCache)
        )
        self.state_bytes, self.page_bytes = (
            sum(a.nbytes // a.shape[2] for a in jax.tree.leaves(x)) or 1 for x in (slots, pages)
        )
        if state.expert_id_pages is not None:
            chosen = state.expert_id_pages.expert_ids
            self.page_bytes += chosen.nbytes // chosen.shape[2]
        self._programs = self._compile(config, model.config.vocab_size)
        self.num_programs = len(self._programs)

    @property
    def weights(self) -> list[Any]:
        """Return the weights, leaf by leaf."""
        return self._buffers["model"]

    def run_program(self, name: str, size: int, *host: Any) -> Any:
        """Run a program of some size (0 where there is one alone) on host arrays.

        Returns:
          what it makes beside the memory that stays here.
        """
        taken = _TAKES[name]
        out = self._programs[name, size](*(self._buffers[part] for part in taken), *host)
        if name in _ONLY_READ:
            return out
        kept = [part for part in taken if part != "model"]
        if len(kept) == 1:
            self._buffers[kept[0]] = out
            return None
        *new, made = out
        self._buffers.update(zip(kept, new, strict=True))
        for array in jax.tree.leaves(made):
            array.copy_to_host_async()
        return made

    def swap_out(self, name: Hashable, pieces: Sequence[tuple[Any, Any]]) -> None:
        """Copy a slot, pages and the slot's row to host memory; pieces: arguments of `read`."""
        held = [self.run_program("read", 0, *piece) for piece in pieces]
        row = self.run_program("read_row", 0, pieces[0][0])
        self._host_copies[name] = [jax.tree.map(_HostCopy, x) for x in (*held, row)]

    def swap_in(self, name: Hashable, pieces: Sequence[tuple[Any, Any]]) -> None:
        """Copy them back, perhaps elsewhere."""
        back = [jax.tree.map(lambda kept: kept.to_device(), x) for x in self._host_copies.pop(name)]
        for piece, held in zip(pieces, back, strict=False):
            self.run_program("write", 0, *piece, held)
        self.run_program("write_row", 0, pieces[0][0], back[-1])

    def drop_host_copy(self, name: Hashable) -> None:
        """Forget the host's copy."""
        self._host_copies.pop(name, None)

    def swap_weights(self, model: Any) -> None:
        """Take other weights.

        Raises:
          ValueError: as `check`.
        """
        self.check_weights(model)
        # The caller may change host arrays later, which device_put need not copy; and an array
        # committed elsewhere would ask for another program.
        leaves = jax.tree.leaves(model)
        leaves = [np.array(new) if isinstance(new, np.ndarray) else new for new in leaves]
        self._buffers["model"] = [
            jax.device_put(new, old.sharding)
            for old, new in zip(self._buffers["model"], leaves, strict=True)
        ]

    def check_weights(self, model: Any) -> None:
        """Raise ValueError for weights of other shapes, dtypes or layout."""
        leaves, tree = jax.tree.flatten(model)
        if tree != self._tree:
            raise ValueError(
                "swap_weights: got another model; wanted other weights of the same model"
            )
        for old, new in zip(self._buffers["model"], leaves, strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"swap_weights: got {jax.typeof(new)}; wanted {jax.typeof(old)}, as the weights before"
                )

    def keep_alive(self) -> None:
        """Do nothing: one process has nobody to wait with."""

    def dismiss_followers(self) -> None:
        """Do nothing, likewise."""

    def close(self) -> None:
        """Do nothing, likewise."""

    def _compile(self, config: config_lib.EngineConfig, vocab_size: int) -> dict[Any, Any]:
        """Compile all programs, several at a time."""
        recipe = programs.Tiling(config.attention_tile, config.matmul_tile)
        tree, state, rows = self._tree, self._buffers["state"], self._buffers["rows"]

        def decode(leaves, state, rows, batch, steps):
            model = jax.tree.unflatten(tree, leaves)
            most = config.decode_steps
            return programs.decode_tokens(model, state, rows, batch, steps, recipe, most)

        def prefill(leaves, state, rows, batch, prompts):
            model = jax.tree.unflatten(tree, leaves)
            return programs.prefill_prompts(model, state, rows, batch, prompts, recipe)

        def verify(leaves, state, rows, batch, drafts):
            model = jax.tree.unflatten(tree, leaves)
            return programs.verify_drafts(model, state, rows, batch, drafts, recipe)

        one, some = np.int32(0), np.zeros(transfers.SWAP_PAGES, np.int32)
        jobs: dict[tuple[str, int], tuple] = {
            ("copy", 0): (transfers.copy_states, one, one),
            ("reset", 0): (transfers.reset_slot, one, *host_batch.make_bias({})),
            ("count", 0): (transfers.count_tokens, one, host_batch.pad_tokens([]), np.bool_(True)),
            ("set_mask", 0): (transfers.set_mask, one, host_batch.make_free_mask(vocab_size)),
        }
        done: dict[Any, Any] = {}
        if config.host_bytes:
            read = CompiledProgram(
                transfers.read_sequence, (), state, one, some, where=self._output_shardings("read")
            )
            row = self._replicate_shapes(jax.eval_shape(transfers.read_sampling_state, rows, one))
            done["read", 0] = read
            jobs["write", 0] = (transfers.write_sequence, one, some, read.output_shapes)
            jobs["read_row", 0] = (transfers.read_sampling_state, one)
            jobs["write_row", 0] = (transfers.write_sampling_state, one, row)
        if config.record_routes:
            jobs["read_routes", 0] = (transfers.read_expert_ids, some)
        for size in config.decode_batch_sizes:
            jobs["decode", size] = (decode, host_batch.make_empty_batch(size, config), one)
        if config.draft_tokens:
            size = config.decode_batch_sizes[0]
            drafts = np.zeros((size, config.attention_tile), np.int32)
            jobs["verify", size] = (verify, host_batch.make_empty_batch(size, config), drafts)
        for size in config.prefill_tokens:
            batch = host_batch.make_empty_batch(host_batch.MAX_PREFILL_CHUNKS, config)
            jobs["prefill", size] = (prefill, batch, host_batch.make_empty_prompts(size, config))

        def make(key, function, *host):
            taken = _TAKES[key[0]]
            memory = [self._buffers[part] for part in taken]
            given = [i for i, part in enumerate(taken) if part != "model"]
            given = [] if key[0] in _ONLY_READ else given
            return CompiledProgram(
                function, given, *memory, *host, where=self._output_shardings(key[0])
            )

        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = {key: pool.submit(make, key, *job) for key, job in jobs.items()}
            return done | {key: future.result() for key, future in made.items()}

    def _output_shardings(self, name: str) -> Any:
        """Return the shardings of a program's outputs; None on one device."""
        if self._replicated_sharding is None:
            return None
        state = jax.tree.map(lambda a: a.sharding, self._buffers["state"])
        if name in ("copy", "write"):
            return state
        if name == "read":  # without the axis of slots or pages, which is not split
            return None
        if name in ("decode", "verify", "prefill"):
            return (state, self._replicated_sharding, self._replicated_sharding)
        return self._replicated_sharding

    def _replicate_shapes(self, shapes: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._replicated_sharding),
            shapes,
        )


class _HostCopy:
    """This process's part of an array, in host memory."""

    def __init__(self, array: jax.Array):
        self._shape, self._sharding = array.shape, array.sharding
        self._parts = [(part.device, np.asarray(part.data)) for part in array.addressable_shards]

    def to_device(self) -> jax.Array:
        """Return the array again."""
        parts = [jax.device_put(data, device) for device, data in self._parts]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


class CompiledProgram:
    """A function compiled for arguments of given shapes, some of which it consumes.

    where: shardings of its outputs, None for one device.
    """

    def __init__(
        self, function: Callable, donated: Sequence[int], *arguments: Any, where: Any = None
    ):
        # Leaves go in one by one: lowering puts descriptions of arrays into the classes of its
        # arguments, and shape checks of those classes, on in tests, refuse them.
        ends = np.cumsum([0, *(len(jax.tree.leaves(arg)) for arg in arguments)])
        leaves, tree = jax.tree.flatten(arguments)
        given = [leaf for arg in donated for leaf in range(ends[arg], ends[arg + 1])]
        flat = jax.jit(
            lambda *x: function(*jax.tree.unflatten(tree, x)),
            donate_argnums=given,
            out_shardings=where,
        )
        self._compiled = flat.lower(*leaves).compile()

    @property
    def output_shapes(self) -> Any:
        """Return shapes and shardings of what it returns."""
        return jax.tree.map(
            lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            self._compiled.out_info,
            self._compiled.output_shardings,
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*jax.tree.leaves(arguments))

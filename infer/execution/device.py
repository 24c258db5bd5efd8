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

    def __init__(self, model: Any, config: config_lib.Config):
        """Allocate and compile."""
        leaves, self._tree = jax.tree.flatten(model)
        layout = model.layout
        self._everywhere = None if layout is None else NamedSharding(layout.mesh, PartitionSpec())
        state = state_lib.init_serving_state(
            model.config,
            config.slots,
            config.pages,
            config.chunk_tokens,
            model.dtype,
            layout,
            config.record_routes,
        )
        rows = jax.jit(programs.init_rows, static_argnums=(0, 1), out_shardings=self._everywhere)(
            config.slots, model.config.vocab_size
        )
        self._held: dict[str, Any] = {"model": leaves, "state": state, "rows": rows}
        self._swapped: dict[Hashable, list[Any]] = {}
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
    def leaves(self) -> list[Any]:
        """Return the weights, leaf by leaf."""
        return self._held["model"]

    def run(self, name: str, size: int, *host: Any) -> Any:
        """Run a program of some size (0 where there is one alone) on host arrays.

        Returns:
          what it makes beside the memory that stays here.
        """
        taken = _TAKES[name]
        out = self._programs[name, size](*(self._held[part] for part in taken), *host)
        if name in _ONLY_READ:
            return out
        kept = [part for part in taken if part != "model"]
        if len(kept) == 1:
            self._held[kept[0]] = out
            return None
        *new, made = out
        self._held.update(zip(kept, new, strict=True))
        for array in jax.tree.leaves(made):
            array.copy_to_host_async()
        return made

    def swap_out(self, name: Hashable, pieces: Sequence[tuple[Any, Any]]) -> None:
        """Copy a slot, pages and the slot's row to host memory; pieces: arguments of `read`."""
        held = [self.run("read", 0, *piece) for piece in pieces]
        row = self.run("read_row", 0, pieces[0][0])
        self._swapped[name] = [jax.tree.map(_Kept, x) for x in (*held, row)]

    def swap_in(self, name: Hashable, pieces: Sequence[tuple[Any, Any]]) -> None:
        """Copy them back, perhaps elsewhere."""
        back = [jax.tree.map(lambda kept: kept.array(), x) for x in self._swapped.pop(name)]
        for piece, held in zip(pieces, back, strict=False):
            self.run("write", 0, *piece, held)
        self.run("write_row", 0, pieces[0][0], back[-1])

    def drop(self, name: Hashable) -> None:
        """Forget the host's copy."""
        self._swapped.pop(name, None)

    def swap(self, model: Any) -> None:
        """Take other weights.

        Raises:
          ValueError: as `check`.
        """
        self.check(model)
        # The caller may change host arrays later, which device_put need not copy; and an array
        # committed elsewhere would ask for another program.
        leaves = jax.tree.leaves(model)
        leaves = [np.array(new) if isinstance(new, np.ndarray) else new for new in leaves]
        self._held["model"] = [
            jax.device_put(new, old.sharding)
            for old, new in zip(self._held["model"], leaves, strict=True)
        ]

    def check(self, model: Any) -> None:
        """Raise ValueError for weights of other shapes, dtypes or layout."""
        leaves, tree = jax.tree.flatten(model)
        if tree != self._tree:
            raise ValueError("swap: got another model; wanted other weights of the same model")
        for old, new in zip(self._held["model"], leaves, strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"swap: got {jax.typeof(new)}; wanted {jax.typeof(old)}, as the weights before"
                )

    def rest(self) -> None:
        """Do nothing: one process has nobody to wait with."""

    def dismiss(self) -> None:
        """Do nothing, likewise."""

    def close(self) -> None:
        """Do nothing, likewise."""

    def _compile(self, config: config_lib.Config, vocab_size: int) -> dict[Any, Any]:
        """Compile all programs, several at a time."""
        recipe = programs.Recipe(config.tile_rows, config.row_tile)
        tree, state, rows = self._tree, self._held["state"], self._held["rows"]

        def decode(leaves, state, rows, batch, steps):
            model = jax.tree.unflatten(tree, leaves)
            most = config.decode_steps
            return programs.decode(model, state, rows, batch, steps, recipe, most)

        def prefill(leaves, state, rows, batch, prompts):
            model = jax.tree.unflatten(tree, leaves)
            return programs.prefill(model, state, rows, batch, prompts, recipe)

        def verify(leaves, state, rows, batch, drafts):
            model = jax.tree.unflatten(tree, leaves)
            return programs.verify(model, state, rows, batch, drafts, recipe)

        one, some = np.int32(0), np.zeros(transfers.SWAP_PAGES, np.int32)
        jobs: dict[tuple[str, int], tuple] = {
            ("copy", 0): (transfers.copy_states, one, one),
            ("reset", 0): (transfers.reset, one, *host_batch.bias({})),
            ("count", 0): (transfers.count, one, host_batch.counted([]), np.bool_(True)),
            ("set_mask", 0): (transfers.set_mask, one, host_batch.free_mask(vocab_size)),
        }
        done: dict[Any, Any] = {}
        if config.host_bytes:
            read = Program(transfers.read, (), state, one, some, where=self._where("read"))
            row = self._replicated(jax.eval_shape(transfers.read_row, rows, one))
            done["read", 0] = read
            jobs["write", 0] = (transfers.write, one, some, read.outputs)
            jobs["read_row", 0] = (transfers.read_row, one)
            jobs["write_row", 0] = (transfers.write_row, one, row)
        if config.record_routes:
            jobs["read_routes", 0] = (transfers.read_routes, some)
        for size in config.decode_rows:
            jobs["decode", size] = (decode, host_batch.empty_batch(size, config), one)
        if config.draft_tokens:
            size = config.decode_rows[0]
            drafts = np.zeros((size, config.tile_rows), np.int32)
            jobs["verify", size] = (verify, host_batch.empty_batch(size, config), drafts)
        for size in config.prefill_tokens:
            batch = host_batch.empty_batch(host_batch.PREFILL_PARTS, config)
            jobs["prefill", size] = (prefill, batch, host_batch.empty_prompts(size, config))

        def make(key, function, *host):
            taken = _TAKES[key[0]]
            memory = [self._held[part] for part in taken]
            given = [i for i, part in enumerate(taken) if part != "model"]
            given = [] if key[0] in _ONLY_READ else given
            return Program(function, given, *memory, *host, where=self._where(key[0]))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = {key: pool.submit(make, key, *job) for key, job in jobs.items()}
            return done | {key: future.result() for key, future in made.items()}

    def _where(self, name: str) -> Any:
        """Return the shardings of a program's outputs; None on one device."""
        if self._everywhere is None:
            return None
        state = jax.tree.map(lambda a: a.sharding, self._held["state"])
        if name in ("copy", "write"):
            return state
        if name == "read":  # without the axis of slots or pages, which is not split
            return None
        if name in ("decode", "verify", "prefill"):
            return (state, self._everywhere, self._everywhere)
        return self._everywhere

    def _replicated(self, shapes: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._everywhere), shapes
        )


class _Kept:
    """This process's part of an array, in host memory."""

    def __init__(self, array: jax.Array):
        self._shape, self._sharding = array.shape, array.sharding
        self._parts = [(part.device, np.asarray(part.data)) for part in array.addressable_shards]

    def array(self) -> jax.Array:
        """Return the array again."""
        parts = [jax.device_put(data, device) for device, data in self._parts]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


class Program:
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
    def outputs(self) -> Any:
        """Return shapes and shardings of what it returns."""
        return jax.tree.map(
            lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            self._compiled.out_info,
            self._compiled.output_shardings,
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*jax.tree.leaves(arguments))

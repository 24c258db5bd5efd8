"""Counting collectives: small texts of every form, and programs compiled for CPU and TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1_jax.plan import aot, collectives, topology

# As XLA for TPU prints them: loops carry no note of their length.
TPU_LOOPS = """HloModule jit_f, is_scheduled=true, num_partitions=8

FileNames
1 "f.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %b = f32[]{:T(128)} parameter(1)
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner_cond (p: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner_body (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.1 = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %next = s32[]{:T(128)} add(%i.1, %one)
  %ar = f32[8,128]{1,0} all-reduce(%x), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %ar)
}

%outer_cond (q: (s32[], f32[8,128], s32[])) -> pred[] {
  %q = (s32[], f32[8,128], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] get-tuple-element(%q), index=2
  ROOT %lt.1 = pred[] compare(%j, %end), direction=LT
}

%outer_body (q.1: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %q.1 = (s32[], f32[8,128], s32[]) parameter(0)
  %two = s32[] constant(2)
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %y = f32[8,128] get-tuple-element(%q.1), index=1
  %end.1 = s32[] get-tuple-element(%q.1), index=2
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,128]) tuple(%zero, %y)
  %loop = (s32[], f32[8,128]) while(%start), condition=%inner_cond, body=%inner_body
  %z = f32[8,128] get-tuple-element(%loop), index=1
  %step = s32[] add(%j.1, %two)
  ROOT %t.1 = (s32[], f32[8,128], s32[]) tuple(%step, %z, %end.1)
}

ENTRY %main (w: f32[8,128]) -> f32[8,128] {
  %w = f32[8,128]{1,0:T(8,128)} parameter(0)
  %four = s32[] constant(4)
  %from = s32[] constant(1)
  %carry = (s32[], f32[8,128], s32[]) tuple(%from, %w, %four)
  %loops = (s32[], f32[8,128], s32[]) while(%carry), condition=%outer_cond, body=%outer_body
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loops), index=1
}
"""


def entry(lines, before=""):
    head = f"HloModule m, num_partitions=4\n\n{before}\n"
    return head + f"ENTRY %main (w: f32[4]) -> f32[4] {{\n{lines}\n}}\n"


def count(text):
    found, unknown = collectives.count_collectives(text)
    return {kind: (traffic.count, traffic.bytes) for kind, traffic in found.items()}, unknown


def test_nested_loops_multiply():
    # 1, 3: two runs of the outer loop, three of the inner; 4,096 bytes among four chips.
    assert count(TPU_LOOPS) == ({"all-reduce": (6, 6 * 2 * 4096 * 3 / 4)}, 0)


def test_noted_trip_count_wins_and_unknown_loops_are_counted_once():
    noted = TPU_LOOPS.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert count(noted)[0]["all-reduce"][0] == 14
    unknown = TPU_LOOPS.replace("direction=LT", "direction=GT")
    assert count(unknown)[0]["all-reduce"][0] == 1
    assert count(unknown)[1] == 2


def test_a_jobs_own_trips_and_branch_shares_count():
    unknown = TPU_LOOPS.replace("direction=LT", "direction=GT")
    found, num_unknown = collectives.count_collectives(unknown, lambda frames: 5)
    assert (found["all-reduce"].count, num_unknown) == (25, 0)
    branch = "%b (q: f32[4]) -> f32[4] {\n"
    branch += "  %q = f32[4] parameter(0)\n  ROOT %s = f32[4] all-reduce(%q), replica_groups={}\n}"
    lines = "  %w = f32[4] parameter(0)\n  %p = pred[] constant(true)\n"
    lines += "  ROOT %c = f32[4] conditional(%p, %w, %w), branch_computations={%b, %b}"
    for share, runs in ((1.0, 2), (0.25, 0.5), (0.0, None)):
        found, _ = collectives.count_collectives(
            entry(lines, branch), find_branch_share=lambda frames, share=share: share
        )
        assert (found["all-reduce"].count if found else None) == runs
    # One branch alone always runs.
    lines = lines.replace("%w, %w), branch_computations={%b, %b}", "%w), branch_computations={%b}")
    found, _ = collectives.count_collectives(
        entry(lines, branch), find_branch_share=lambda frames: 0.0
    )
    assert found["all-reduce"].count == 1


GROUPS = "replica_groups={{0,1},{2,3}}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"bf16[8,4]{{1,0}} all-gather(%w), {GROUPS}, dimensions={{0}}", ("all-gather", 32)),
        (f"(f32[4], f32[8]) all-gather-start(%w), {GROUPS}", ("all-gather", 16)),
        (f"f32[2] reduce-scatter(%w), {GROUPS}, to_apply=%add", ("reduce-scatter", 8)),
        (f"f32[4] all-reduce-start(%w), {GROUPS}, to_apply=%add", ("all-reduce", 16)),
        (f"(f32[4], s8[4]) all-reduce(%w, %w), {GROUPS}, to_apply=%add", ("all-reduce", 20)),
        ("pred[4] all-to-all(%w), replica_groups=[1,4]<=[4]", ("all-to-all", 3)),
        ("f32[4] all-to-all(%w), replica_groups={}", ("all-to-all", 12)),
        (f"f32[64] ragged-all-to-all(%w, %w), {GROUPS}", ("ragged-all-to-all", 8)),
        (f"f32[2] ragged-all-to-all(%w, %w), {GROUPS}", ("ragged-all-to-all", 4)),
        (
            "(f32[4], f32[4], u32[], u32[]) collective-permute-start(%w), "
            "source_target_pairs={{0,1}}",
            ("collective-permute", 16),
        ),
        (
            "f32[4] all-reduce(%w), to_apply=%add, replica_groups=mesh['a'=2,'b'=8] {'a','b':(1)4}",
            ("all-reduce", 28),
        ),
    ],
)
def test_each_kind(line, expected):
    kind, size = expected
    text = entry(f"  %w = f32[4]{{0}} parameter(0)\n  ROOT %c.1 = {line}")
    assert count(text) == ({kind: (1, size)}, 0)


def test_pairs_branches_and_fusions():
    inside = """%wrapped (a: f32[4]) -> f32[8] {
  %a = f32[4] parameter(0)
  ROOT %g = f32[8] all-gather(%a), replica_groups=[2,2]<=[4]
}

%all-reduce-scatter.1 (b: f32[4]) -> f32[2] {
  %b = f32[4] parameter(0)
  %r = f32[4] all-reduce(%b), replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %s = f32[2] dynamic-slice(%r, %b), dynamic_slice_sizes={2}
}

%branch (d: f32[4]) -> f32[4] {
  %d = f32[4] parameter(0)
  ROOT %p = f32[4] collective-permute(%d), source_target_pairs={{0,1}}
}
"""
    lines = """  %w = f32[4] parameter(0)
  %start = ((f32[4]), f32[8], u32[]) async-start(%w), calls=%wrapped
  %update = ((f32[4]), f32[8], u32[]) async-update(%start), calls=%wrapped
  %done = f32[8] async-done(%update), calls=%wrapped
  %fused = f32[2] fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %either = f32[4] conditional(%w, %w, %w), branch_computations={%branch, %branch}"""
    found, _ = count(entry(lines, inside))
    assert found == {
        "all-gather": (1, 16),
        "reduce-scatter": (1, 8),
        "collective-permute": (2, 32),
    }


def test_a_collective_on_sparse_core_lies_in_two_computations():
    """The compiler wraps it in a custom call, and that in an asynchronous operation."""
    text = """HloModule m, num_partitions=4

%called (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128] parameter(0)
  ROOT %all-gather = bf16[32,128] all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%async (q: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128] parameter(0)
  ROOT %call = bf16[32,128] custom-call(%q), called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,128]) -> bf16[32,128] {
  %x = bf16[8,128] parameter(0)
  %start = ((), ()) async-start(), async_execution_thread="sparsecore", calls=%async
  %update = ((bf16[8,128]), bf16[32,128]) async-update(%start, %x)
  ROOT %done = bf16[32,128] async-done(%update)
}
"""
    traffic = collectives.CollectiveTraffic(1, 3 / 4 * 32 * 128 * 2)
    assert collectives.count_collectives(text) == ({"all-gather": traffic}, 0)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives.count_collectives("HloModule m\n")


LAYERS, WIDTH, ROWS = 5, 256, 64


def traced(devices):
    """A scan over layers inside shard_map with each kind of exchange, and its gradient."""
    mesh = Mesh(np.array(devices).reshape(2, -1), ("expert", "fsdp"))
    ring = mesh.shape["fsdp"]

    def body(weights, x):
        def layer(x, w):
            full = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            # Otherwise TPUs gather what they multiply, bfloat16.
            y = jnp.matmul(x, full, precision="highest")
            y = jax.lax.all_to_all(jnp.tanh(y), "expert", 0, 0, tiled=True)
            return jax.lax.ppermute(y, "fsdp", [(i, (i + 1) % ring) for i in range(ring)]), None

        x, _ = jax.lax.scan(layer, x, weights)
        return jax.lax.psum(jnp.sum(x**2), ("expert", "fsdp"))

    both = PartitionSpec(("expert", "fsdp"), None)
    specs = (PartitionSpec(None, "fsdp", None), both)
    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    shapes = ((LAYERS, WIDTH, WIDTH), (ROWS * len(devices), WIDTH))
    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    )
    return jax.jit(jax.grad(sharded)).trace(*arguments), ring


def check_program(text, ring):
    found, unknown = count(text)
    weights, rows = 4 * LAYERS * WIDTH**2 * (1 - 1 / ring), 4 * LAYERS * ROWS * WIDTH
    assert unknown == 0
    assert found["all-gather"] == (LAYERS, weights)
    assert found["reduce-scatter"] == (LAYERS, weights)
    # The last layer's gradient, or the first one's, need not be exchanged.
    for kind, size in (("all-to-all", rows / 2), ("collective-permute", rows)):
        number, received = found[kind]
        assert 2 * LAYERS - 1 <= number <= 2 * LAYERS
        assert received == pytest.approx(size / LAYERS * number)


def test_program_compiled_for_cpu():
    program, ring = traced(jax.devices())
    check_program(program.lower().compile().as_text(), ring)


def test_program_compiled_for_tpu():
    pytest.importorskip("libtpu")
    devices = topology.get_slice_devices(topology.parse_slice("v5p:2x2x1"))
    program, ring = traced(devices)
    compiled = aot.compile_program(program, aot.probe_hbm_limit_bytes(devices[0]))
    assert compiled.fits
    check_program(compiled.hlo_text, ring)

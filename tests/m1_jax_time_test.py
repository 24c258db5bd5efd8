"""Predicted times: the parts by small texts, and programs of known cost compiled for v5p."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from m1_jax import ModelConfig
from m1_jax.plan import (
    aot,
    chip_specs,
    estimate,
    hbm_traffic,
    hlo,
    kernel_costs,
    meshes,
    program_work,
    source_frames,
    time_assumptions,
    time_prediction,
    time_report,
    time_summary,
    topology,
)
from m1_jax.serving import ragged_batch

V5P = chip_specs.CHIP_SPECS["v5p"]
NOTHING_ASSUMED = time_assumptions.TimeAssumptions()
WORK = program_work.ProgramWork(tokens=4096, flops=1e12)

# Tables and forms as the TPU compiler prints them. A matrix of 4 MiB takes 1.5 us of v5p's HBM.
TABLES = """HloModule m, is_scheduled=true, num_partitions=4

FileNames
1 "/home/user/train/checkout/m1_jax/serving/softmax.py"
2 "/usr/lib/python3/site-packages/jax/_src/lax/lax.py"
3 "/home/user/train/checkout/m1_jax/decoder_layer.py"

FunctionNames
1 "attend_pages.<locals>.attend_tile"
2 "while_loop"
3 "DecoderLayer.__call__"

FileLocations
1 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=70 end_line=70 column=4 end_column=8}
3 {file_name_id=3 function_name_id=3 line=12 end_line=12 column=4 end_column=8}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=1 parent_frame_id=2}

"""
MATRIX = "f32[1024,1024]{1,0:T(8,128)}"


def cycles(number):
    return f'backend_config={{"window_config":{{"x":[],"estimated_cycles":"{number}"}}}}'


def make_text(lines, computations=""):
    """Return a module whose entry has these lines after its parameter %w, a matrix."""
    return (
        f"{TABLES}{computations}\nENTRY %main (w: f32[1024,1024]) -> f32[1024,1024] {{\n"
        f"  %w = {MATRIX} parameter(0)\n{lines}\n}}\n"
    )


def predict(text, assumptions=NOTHING_ASSUMED):
    times = time_prediction.predict_time(text, V5P, assumptions)
    return times["low"], times["high"]


# ---- reading


def test_frames_are_our_own_calls_innermost_first():
    frames = source_frames.parse_source_frames(TABLES)
    (inner, outer) = frames[3]
    assert (inner.module, inner.function, inner.line) == (
        "m1_jax.serving.softmax",
        "attend_tile",
        70,
    )
    assert str(outer) == "m1_jax/decoder_layer.py:12 __call__"
    assert frames[1] == [outer]
    assert source_frames.find_frames(frames, "x), metadata={stack_frame_id=2}") == [inner, outer]
    assert source_frames.find_frames(frames, "x)") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "jit(train_step)/transpose(jvp())/shard_map/while/body/closed_call/checkpoint/lightning/dot",
            "backward/lightning/dot",
        ),
        (
            "jit(f)/jvp()/exchange/while/body/experts/cond/branch_0_fun/ragged",
            "exchange/experts/ragged",
        ),
        ("add", "add"),
    ],
)
def test_scopes_are_those_of_the_model(name, expected):
    attributes = f'%x), metadata={{op_name="{name}" stack_frame_id=3}}'
    assert source_frames.find_scopes(attributes) == expected
    assert source_frames.find_scopes("%x)") == ""


def test_bytes_in_hbm():
    shape = "(bf16[8,4]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)S(1)}, s4[<=6]{0}, token[])"
    assert hlo.hbm_bytes(shape) == 64 + 3
    assert hlo.array_bytes(shape) == 64 + 32 + 3


FUSIONS = f"""%sliced (p: {MATRIX}, i: s32[]) -> f32[8,1024] {{
  %p = {MATRIX} parameter(0)
  %i = s32[] parameter(1)
  %b = {MATRIX} bitcast(%p)
  ROOT %s = f32[8,1024]{{1,0}} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={{8,1024}}
}}

%updated (q: {MATRIX}, u: f32[8,1024], j: s32[]) -> {MATRIX} {{
  %q = {MATRIX} parameter(0)
  %u = f32[8,1024] parameter(1)
  %j = s32[] parameter(2)
  ROOT %d = {MATRIX} dynamic-update-slice(%q, %u, %j, %j)
}}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"{MATRIX} add(%w, %w)", 3 * 2**22),
        ("f32[8,1024]{1,0} fusion(%w, %k), kind=kLoop, calls=%sliced", 2 * 2**15),
        (f"{MATRIX} fusion(%w, %r, %k), kind=kLoop, calls=%updated", 3 * 2**15),
        ("f32[1024,1024]{1,0:T(8,128)S(1)} copy(%w)", 2**22),
    ],
)
def test_traffic_counts_slices_and_updates(line, expected):
    text = make_text(
        f"  %k = s32[]{{:S(6)}} constant(0)\n  %r = f32[8,1024] slice(%w)\n  ROOT %x = {line}",
        FUSIONS,
    )
    module = hlo.parse_module(text)
    counter = hbm_traffic.TrafficCounter(module)
    counted = counter.count_bytes("main", module.computations["main"]["x"])
    assert counted == pytest.approx(expected)


def test_instructions_that_metadata_break_over_lines():
    metadata = '{"block_q": 1024, "more": "}"}'
    text = make_text(
        f"  %k = {MATRIX} custom-call(%w), frontend_attributes={{kernel_metadata={{\n"
        f'"xprof_metadata":"{metadata}"\n'
        f"}}}}, metadata={{stack_frame_id=3}}\n  ROOT %x = {MATRIX} add(%k, %w)",
        # A computation may end with the name of a thread.
        BRANCHES.replace("}\n", '}, execution_thread="sparsecore"\n'),
    )
    instructions = hlo.parse_module(text).computations["main"]
    assert list(instructions) == ["w", "k", "x"]
    assert instructions["k"].operand_names == ["w"]
    assert "stack_frame_id=3" in instructions["k"].operands_and_attributes


# ---- the schedule


def test_bytes_are_the_low_model_and_cycles_the_high_one():
    low, high = predict(make_text(f"  ROOT %x = {MATRIX} add(%w, %w), {cycles(35_000)}"))
    hbm_secs = 3 * 2**22 / V5P.hbm_bytes_per_sec
    assert low.secs == pytest.approx(hbm_secs / 0.85)
    assert high.secs == pytest.approx(20e-6)
    # Cycles of the largest integer mean that there is no estimate.
    low, high = predict(make_text(f"  ROOT %x = {MATRIX} add(%w, %w), {cycles(2**63 - 1)}"))
    assert low.secs == high.secs


LOOP = f"""%condition (p: (s32[], {MATRIX})) -> pred[] {{
  %p = (s32[], {MATRIX}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] LIMIT
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%body (q: (s32[], {MATRIX})) -> (s32[], {MATRIX}) {{
  %q = (s32[], {MATRIX}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %x = {MATRIX} get-tuple-element(%q), index=1
  %one = s32[] constant(1)
  %y = {MATRIX} add(%x, %x)
  %next = s32[] add(%j, %one)
  ROOT %t = (s32[], {MATRIX}) tuple(%next, %y)
}}
"""
WHILE = f"""  %zero = s32[] constant(0)
  %c = (s32[], {MATRIX}) tuple(%zero, %w)
  %l = (s32[], {MATRIX}) while(%c), condition=%condition, body=%body, metadata={{stack_frame_id=3}}
  ROOT %g = {MATRIX} get-tuple-element(%l), index=1"""


def test_loops_run_as_often_as_the_text_or_the_job_says():
    once, _ = predict(make_text(WHILE, LOOP.replace("LIMIT", "constant(1)")))
    known, _ = predict(make_text(WHILE, LOOP.replace("LIMIT", "constant(5)")))
    assert known.secs == pytest.approx(5 * once.secs)
    unknown = make_text(WHILE, LOOP.replace("LIMIT", "add(%i, %i)"))
    low, _ = predict(unknown)
    assert low.secs == pytest.approx(once.secs)
    assert low.uncovered_loops == ["m1_jax/serving/softmax.py:70 attend_tile"]
    assumed = time_assumptions.TimeAssumptions(
        loop_trips={"m1_jax.serving.softmax": 7, "m1_jax.decoder_layer": 9}
    )
    low, _ = predict(unknown, assumed)
    assert low.secs == pytest.approx(7 * once.secs)
    assert not low.uncovered_loops
    named = dataclasses.replace(
        assumed, loop_trips={**assumed.loop_trips, "m1_jax.serving.softmax.attend_tile": 3}
    )
    assert predict(unknown, named)[0].secs == pytest.approx(3 * once.secs)


BRANCHES = f"""%work (a: {MATRIX}) -> {MATRIX} {{
  %a = {MATRIX} parameter(0)
  ROOT %y = {MATRIX} add(%a, %a)
}}

%idle (b: {MATRIX}) -> {MATRIX} {{
  ROOT %b = {MATRIX} parameter(0)
}}
"""


def test_a_conditional_takes_the_dearer_branch_as_often_as_is_assumed():
    line = f"  ROOT %c = {MATRIX} conditional(%w, %w, %w), branch_computations={{%idle, %work}}"
    text = make_text(f"{line}, metadata={{stack_frame_id=2}}", BRANCHES)
    always, _ = predict(text)
    half = time_assumptions.TimeAssumptions(branch_shares={"m1_jax.decoder_layer": 0.5})
    assert predict(text, half)[0].secs == pytest.approx(always.secs / 2)
    # What is left of a choice of platform has one branch.
    only = text.replace("%w, %w, %w)", "%w, %w)").replace("{%idle, %work}", "{%work}")
    assert only != text
    assert predict(only, half)[0].secs == predict(only)[0].secs


GATHER = "replica_groups=[2,2]<=[4], dimensions={0}"


def test_what_runs_beside_is_exposed_as_far_as_nothing_covers_it():
    start = f"  %s = ({MATRIX}, f32[2048,1024]) all-gather-start(%w), {GATHER}\n"
    end = "  %d = f32[2048,1024] all-gather-done(%s)\n"
    add = f"  %a = {MATRIX} add(%w, %w)\n"
    adds = "".join(f"  %a{k} = {MATRIX} add(%w, %w)\n" for k in range(20))
    secs = 2**22 / (2 * V5P.link_bytes_per_sec) + 3e-6
    hbm_secs = 3 * 2**22 / V5P.hbm_bytes_per_sec / 0.85
    for text, exposed_secs in (
        (make_text(start + end + add), secs),
        (make_text(start + add + end), secs - hbm_secs),
        (make_text(start + adds + end), 0),
    ):
        low, _ = predict(text)
        (row,) = [row for row in low.instructions if row.is_collective]
        assert row.busy_secs == pytest.approx(secs)
        num_adds = text.count(" add(")
        assert row.exposed_secs == pytest.approx(exposed_secs)
        assert low.secs == pytest.approx(num_adds * hbm_secs + exposed_secs)
    # A synchronous one has all of it, and the algorithm's links.
    two_dims = '"collective_algorithm_config":{"emitter":"2DAllGather"}'
    line = f"  ROOT %g = f32[2048,1024] all-gather(%w), {GATHER}, backend_config={{{two_dims}}}"
    low, _ = predict(make_text(line))
    assert low.secs == pytest.approx(2**22 / (4 * V5P.link_bytes_per_sec) + 3e-6)


WRAPPED_GATHER = f"""%sparse (a: {MATRIX}) -> f32[2048,1024] {{
  %a = {MATRIX} parameter(0)
  ROOT %g = f32[2048,1024] all-gather(%a), {GATHER}
}}
"""


def test_collectives_on_sparse_cores_and_prefetches_run_beside():
    lines = f"""  %c = (f32[1024,1024]{{1,0:S(1)}}, {MATRIX}, u32[]) copy-start(%w)
  %s = (({MATRIX}), f32[2048,1024], u32[]) async-start(%w), calls=%sparse
  %m = (({MATRIX}), f32[2048,1024], u32[]) async-update(%s), calls=%sparse
  %d = f32[2048,1024] async-done(%m), calls=%sparse
  %e = f32[1024,1024]{{1,0:S(1)}} copy-done(%c)"""
    low, _ = predict(make_text(lines, WRAPPED_GATHER))
    gather, prefetch = low.instructions
    secs = 2**22 / (2 * V5P.link_bytes_per_sec) + 3e-6
    assert (gather.cost.kind, gather.cost.detail) == ("all-gather", "all-gather on SparseCore")
    assert gather.is_collective
    assert gather.exposed_secs == low.secs == pytest.approx(secs)
    # The prefetch ended while the program waited for the gather.
    assert prefetch.cost.kind == "prefetches"
    assert prefetch.busy_secs == pytest.approx(2**22 / V5P.hbm_bytes_per_sec)
    assert prefetch.exposed_secs == 0


# ---- kernels


def price_call(operands, attributes, result, assumptions=NOTHING_ASSUMED, name="kernel.3"):
    parameters = "".join(
        f"  %p{k} = {shape} parameter({k + 1})\n" for k, shape in enumerate(operands)
    )
    names = ", ".join(f"%p{k}" for k in range(len(operands)))
    line = f'{result} custom-call({names}), custom_call_target="tpu_custom_call", {attributes}'
    text = make_text(f"{parameters}  ROOT %{name} = {line}")
    module = hlo.parse_module(text)
    pricer = kernel_costs.KernelPricer(module, V5P, assumptions)
    return pricer.price("main", module.computations["main"][name], None), pricer


GROUPED = ("s32[4]", "bf16[12288,6144]", "bf16[4,6144,9216]")


@pytest.mark.parametrize(
    ("tile", "rows", "bound", "gigabytes"),
    [
        # Rows are read for each of 72 tiles of columns.
        ("128,6144,128", 8192, "HBM", 2 * 8192 * (6144 * 72 + 9216) + 4 * 2 * 6144 * 9216),
        ("128,6144,2048", 8192, "MXU", 2 * 8192 * (6144 * 5 + 9216) + 4 * 2 * 6144 * 9216),
        # All of the buffer, where the job does not say how many rows are real.
        ("128,6144,2048", None, "MXU", 2 * 12288 * (6144 * 5 + 9216) + 4 * 2 * 6144 * 9216),
    ],
)
def test_grouped_product_by_its_tile(tile, rows, bound, gigabytes):
    cost, _ = price_call(
        GROUPED,
        f'frontend_attributes={{ragged_dot_tiling="{tile}"}}',
        "bf16[12288,9216]",
        time_assumptions.TimeAssumptions(num_expert_rows=rows),
    )
    assert cost.kind == "experts"
    assert f"{bound} bound" in cost.detail
    assert cost.num_bytes == pytest.approx(gigabytes)
    product_secs = 2 * (rows or 12288) * 6144 * 9216 / (0.85 * V5P.flops_per_sec)
    hbm_secs = gigabytes / V5P.hbm_bytes_per_sec
    assert cost.low_secs == pytest.approx(product_secs if bound == "MXU" else hbm_secs)


def test_idle_experts_are_not_read():
    few = time_assumptions.TimeAssumptions(num_expert_rows=2, num_busy_experts=1.5)
    cost, _ = price_call(GROUPED, 'x={ragged_dot_tiling="128,6144,2048"}', "bf16[12288,9216]", few)
    assert cost.num_bytes == pytest.approx(1.5 * 2 * 6144 * 9216, rel=0.01)


def test_kernels_by_name_by_estimate_and_by_bytes():
    operands = (f"bf16[1,64,4096,{3 * 128}]",)
    cost, pricer = price_call(operands, "x=1", "bf16[1,64,4096,128]", name="lightning_fwd.2")
    assert cost.low_secs == pytest.approx(64 * 4096 * 1088 / V5P.hbm_bytes_per_sec)
    assert not pricer.unknown_kernels
    # 8 query heads of 4,096 tokens and 2 key heads: two products of a pair, in 10 of 16 blocks.
    heads = ("bf16[8,4096,128]", "bf16[2,4096,128]", "bf16[2,4096,128]")
    cost, pricer = price_call(("s8[4,4]", *heads), "x=1", heads[0], name="splash_mha_fwd.1")
    flops = 2 * 2 * 8 * 4096 * 4096 * 10 / 16 * 128
    assert cost.low_secs == pytest.approx(flops / (0.5 * V5P.flops_per_sec))
    assert cost.kind == "softmax attention"
    assert not pricer.unknown_kernels
    estimate_text = (
        'backend_config={"custom_call_config":{"body":"TUzvUg","cost_estimate":{'
        '"bytes_accessed":"2765000000","flops":"459000000000","remote_bytes_transferred":"0",'
        '"transcendentals":"7"},"input_memory_space_colors":[]}}'
    )
    cost, pricer = price_call(operands, estimate_text, MATRIX)
    assert cost.low_secs == pytest.approx(1e-3)
    assert not pricer.unknown_kernels
    cost, pricer = price_call((MATRIX,), "x=1", MATRIX)
    assert cost.low_secs == pytest.approx(2**23 / V5P.hbm_bytes_per_sec)
    assert pricer.unknown_kernels == {"kernel"}


def test_serving_kernels_read_a_part_of_their_operands():
    decode = time_assumptions.TimeAssumptions(num_running_rows=8, num_cached_tokens=4096)
    queries, cache = "bf16[16,1,128,128]", "bf16[10,1,300,1,128,128]"
    operands = ("s32[2]", "s32[16]", "s32[16,1,32]", queries, cache, cache)
    cost, _ = price_call(operands, "x=1", queries, decode, name="paged_attention.1")
    num_bytes = 8 * 4096 * 2 * 128 * 2 + 2 * 16 * 128 * 128 * 2
    assert cost.num_bytes == pytest.approx(num_bytes)
    assert cost.low_secs == pytest.approx(1.94 * num_bytes / V5P.hbm_bytes_per_sec)
    assert cost.kind == "softmax attention"
    states, keys = "f32[10,7,9,8,128,128]", "bf16[10,7,9,8,128,128]"
    operands = ("s32[2]", "f32[8]", "bf16[8,16,3072]", states, keys, keys)
    cost, _ = price_call(operands, "x=1", states, decode, name="lightning_serving")
    head_bytes = 2**16 * (1 + 1 / 128) + 2**16 + 2 * 128 * 32
    assert cost.num_bytes == pytest.approx(64 * head_bytes + 4 / 3 * 8 * 16 * 3072 * 2)
    assert cost.low_secs == pytest.approx(1.05 * cost.num_bytes / V5P.hbm_bytes_per_sec)
    assert cost.kind == "lightning attention"


# ---- what a job assumes


def job_assumptions(kind, seq, batch, mesh):
    job = estimate.PlanJob(kind, seq, batch)
    layout = meshes.make_job_layout(ModelConfig.m1(), mesh, jax.devices(), job)
    return time_assumptions.make_assumptions(ModelConfig.m1(), job, layout)


def test_a_serving_job_knows_its_tiles_and_key_blocks():
    assumed = job_assumptions("serve", 4096, 64, {"expert": 4, "tensor": 2})
    assert assumed.loop_trips["m1_jax.serving.ragged_batch.scan_attention_tiles"] == 16
    assert assumed.loop_trips["m1_jax.serving.ragged_batch"] == 16 // ragged_batch.TILE_GROUP
    assert assumed.loop_trips["m1_jax.serving.softmax"] == 16
    assert (assumed.num_running_rows, assumed.num_cached_tokens) == (16, 4096)
    assert assumed.num_expert_rows == 32
    assert assumed.num_busy_experts == pytest.approx(8 * (1 - (31 / 32) ** 128))
    assert "64 running rows of 4096 tokens, 16 a device" in "; ".join(assumed.notes)


def test_a_training_job_knows_its_causal_share_and_its_rows():
    assumed = job_assumptions("train", 4096, 8, {"fsdp": 4, "expert": 2})
    assert assumed.branch_shares["m1_jax.ring_attention"] == pytest.approx(
        9 / 16
    )  # 8 blocks of 512
    assert assumed.num_expert_rows == 2 * 4096
    assert assumed.num_busy_experts == pytest.approx(16)


# ---- the summary and its words


def test_summary_and_report():
    start = f"  %s = ({MATRIX}, f32[2048,1024]) all-gather-start(%w), {GATHER}\n"
    end = "  %d = f32[2048,1024] all-gather-done(%s)\n"
    add = f"  ROOT %a = {MATRIX} add(%w, %w), {cycles(35_000)}, metadata={{stack_frame_id=3}}"
    assumed = time_assumptions.TimeAssumptions(notes=("a balanced router",))
    time = time_summary.summarize_time(make_text(start + end + add), V5P, assumed, WORK, 4)
    assert time["kinds"].keys() == {"all-gather", "softmax attention"}
    total = sum(kind["low_secs"] for kind in time["kinds"].values())
    assert total == pytest.approx(time["secs"]["low"])
    assert time["collectives"]["low"]["exposed_share"] == pytest.approx(
        time["kinds"]["all-gather"]["low_secs"] / total
    )
    assert time["mfu"]["low"] == pytest.approx(1e12 / V5P.flops_per_sec / total)
    assert time["tokens_per_chip_hour"]["low"] == pytest.approx(4096 / total * 900)
    assert time["dearest"][1]["sources"] == [
        "m1_jax/serving/softmax.py:70 attend_tile",
        "m1_jax/decoder_layer.py:12 __call__",
    ]
    text = "\n".join(time_report.format_time(time))
    for words in ("MFU", "tokens a chip-hour", "softmax.py:70", "assumed: a balanced router"):
        assert words in text
    decode = dataclasses.replace(WORK, roofline_bytes=V5P.hbm_bytes_per_sec * total / 4)
    time = time_summary.summarize_time(make_text(start + end + add), V5P, assumed, decode, 4)
    assert time["hbm_roofline_share"]["low"] == pytest.approx(1 / 4)
    assert "of the HBM roofline" in "\n".join(time_report.format_time(time))


@pytest.mark.parametrize("text", ["", make_text(f"  ROOT %a = {MATRIX} add(%w, %w)")])
def test_a_dump_without_estimates_has_no_time(text):
    time = time_summary.summarize_time(text, V5P, NOTHING_ASSUMED, WORK, 4)
    assert time.keys() == {"unavailable"}
    (line,) = time_report.format_time(time)
    assert line.startswith("no predicted time: ")


# ---- programs of known cost


def array(*shape, dtype=jnp.bfloat16):
    return shape, dtype


def scan_products(x, matrices):
    return jax.lax.scan(lambda carry, matrix: (carry @ matrix, None), x, matrices)[0]


# function, arrays, ideal seconds at the published peaks, least share of the ideal that is reached.
PEAK, BANDWIDTH = V5P.flops_per_sec, V5P.hbm_bytes_per_sec
KNOWN_PROGRAMS = {
    "bf16 product": (
        jnp.matmul,
        (array(8192, 8192), array(8192, 8192)),
        2 * 8192**3 / PEAK,
        0.85,
    ),
    "float32 product": (
        lambda a, b: jnp.matmul(a, b, precision="highest"),
        (array(4096, 4096, dtype=jnp.float32),) * 2,
        12 * 4096**3 / PEAK,
        0.9,
    ),
    "scan": (
        scan_products,
        (array(4096, 4096), array(10, 4096, 4096)),
        20 * 4096**3 / PEAK,
        0.7,
    ),
    "add": (
        lambda a: a + 1,
        (array(16384, 16384, dtype=jnp.float32),),
        2 * 2**30 / BANDWIDTH,
        0.8,
    ),
    "thin product": (
        jnp.matmul,
        (array(8, 8192), array(8192, 65536)),
        2 * 8192 * 65536 / BANDWIDTH,
        0.6,
    ),
    "grouped product": (
        jax.lax.ragged_dot,
        (array(12288, 6144), array(1, 6144, 9216), array(1, dtype=jnp.int32)),
        2 * 8192 * 6144 * 9216 / PEAK,
        0.65,
    ),
}


@pytest.mark.parametrize("name", KNOWN_PROGRAMS)
def test_programs_of_known_cost(name):
    pytest.importorskip("libtpu")
    function, arrays, ideal_secs, least_share = KNOWN_PROGRAMS[name]
    device = topology.get_slice_devices(topology.parse_slice("v5p:2x2x1"))[0]
    where = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(*a, sharding=where) for a in arrays]
    compiled = aot.compile_program(jax.jit(function).trace(*arguments), 95 * 2**30)
    assumed = time_assumptions.TimeAssumptions(num_expert_rows=8192)
    low, high = predict(compiled.codegen_text, assumed)
    # Nothing is faster than the peaks, and the bracket holds the compiler's own view.
    assert ideal_secs <= low.secs <= ideal_secs / least_share
    assert low.secs <= high.secs <= 2.5 * ideal_secs
    assert not low.uncovered_loops
    assert not low.unknown_kernels

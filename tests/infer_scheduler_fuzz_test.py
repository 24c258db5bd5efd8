"""The scheduler against a device that only remembers, under random operations.

The device knows which tokens each page and slot was computed from. It runs plans in order, as the
real one does, and asserts that whatever a program reads is exactly the prefix that its sequence
needs. Contents are hash chains: the value at a position depends on every token before it and on
the weights version of each.
"""

import collections
import dataclasses
import random

import hypothesis
import pytest
import scheduler_support
from hypothesis import stateful
from hypothesis import strategies as st

from infer.scheduling import plan as plan_lib
from infer.scheduling import scheduler


def chain_of(tokens, version):
    """Return the content after 0, 1, ... tokens, all computed with one version."""
    chain = [0]
    for token in tokens:
        chain.append(hash((chain[-1], token, version)))
    return chain


@dataclasses.dataclass
class Slot:
    """A state slot as the device remembers it.

    chunk: (length, content) of the state at the last chunk border.
    last: the same with the open chunk.
    token: sampled or known, not computed yet.
    stopped: whether the row does nothing any more.
    """

    chunk: tuple[int, int] = (0, 0)
    last: tuple[int, int] = (0, 0)
    token: int | None = None
    stopped: bool = False


@dataclasses.dataclass
class Request:
    """A request as the device remembers it.

    prompt, limit: as submitted.
    stop: length at which the device stops it by itself.
    chain: contents after 0, 1, ... tokens that were computed since it last began.
    output: tokens sampled so far.
    """

    prompt: list
    limit: int
    stop: int
    chain: list = dataclasses.field(default_factory=list)
    output: list = dataclasses.field(default_factory=list)

    def next_token(self, length):
        """Return the token at a position; the same however often it is computed."""
        return (sum(self.prompt) + 7 * length) % 5


class Device:
    """Runs plans on hash chains.

    config, limits: as the scheduler has them. page_holders: holders of a page, by the pool.
    """

    def __init__(self, config, limits, page_holders):
        self.config, self.limits = config, limits
        self.page_holders = page_holders
        self.version = 0
        self.slots = collections.defaultdict(Slot)
        self.pages = {}  # (page, offset): content
        self.host = {}
        self.requests = {}

    def run(self, plan):
        """Run a plan and return its results."""
        for action in plan.actions:
            self._run_action(action)
        programs = plan.entries
        assert not (plan.prefill_chunks and plan.decode_rows)
        assert len({entry.sequence_id for entry in programs}) == len(programs)
        assert len({entry.slot for entry in programs}) == len(programs)
        most_rows = -(-self.config.max_rows // self.limits.num_partitions)
        for partition in range(self.limits.num_partitions):
            chunks = [c for c in plan.prefill_chunks if c.partition == partition]
            rows = sum(-(-c.num_tokens // self.config.attention_tile) for c in chunks)
            assert rows * self.config.attention_tile <= self.config.prefill_tokens[-1]
            assert len(chunks) <= self.limits.max_prefill_chunks
            assert sum(row.partition == partition for row in plan.decode_rows) <= most_rows
        for entry in programs:
            assert self._partition_of(entry.slot, self.limits.num_slots) == entry.partition
            self._assert_in_partition(entry.pages, entry.partition)
        assert plan.max_steps <= self.config.decode_steps
        results = {part.sequence_id: self._prefill(part) for part in plan.prefill_chunks}
        return results | {
            row.sequence_id: self._decode(row, plan.max_steps) for row in plan.decode_rows
        }

    def _run_action(self, action):
        match action:
            case plan_lib.CopyState(source, target):
                assert source != target
                num_slots = self.limits.num_slots
                assert self._partition_of(source, num_slots) == self._partition_of(
                    target, num_slots
                )
                state = self.slots[source]
                self.slots[target] = Slot(state.chunk, state.chunk)
            case plan_lib.SwapOut(sequence_id, slot, pages):
                assert sequence_id not in self.host
                self._assert_in_partition(pages, self._partition_of(slot, self.limits.num_slots))
                state = self.slots.pop(slot)
                self._assert_holds(sequence_id, pages, state.last)
                contents = [[self.pages.get((page, i)) for i in self._offsets()] for page in pages]
                self.host[sequence_id] = state, contents
            case plan_lib.SwapIn(sequence_id, slot, pages):
                self._assert_in_partition(pages, self._partition_of(slot, self.limits.num_slots))
                self.slots[slot], contents = self.host.pop(sequence_id)
                for page, content in zip(pages, contents, strict=True):
                    self.pages |= {(page, i): value for i, value in enumerate(content)}
            case plan_lib.DropHostCopy(sequence_id):
                del self.host[sequence_id]

    def _partition_of(self, member, size):
        """Return the partition of a slot or page, of which a partition has so many."""
        assert member % (size + 1), "padding's own"
        return member // (size + 1)

    def _assert_in_partition(self, pages, partition):
        assert {self._partition_of(p, self.limits.num_pages) for p in pages} <= {partition}

    def _offsets(self):
        return range(self.config.chunk_tokens)

    def _assert_holds(self, sequence_id, pages, state):
        """Assert that pages and state are of the sequence's own prefix."""
        length, content = state
        chain = self.requests[sequence_id].chain
        assert chain[length] == content
        for position in range(length):
            page, offset = divmod(position, self.config.chunk_tokens)
            assert self.pages[pages[page], offset] == chain[position + 1], (sequence_id, position)

    def _compute(self, request, slot, pages, token):
        """Compute one token: extend the chain, the page, the state."""
        length, content = slot.last
        page, offset = divmod(length, self.config.chunk_tokens)
        assert len(request.chain) == length + 1
        assert self.page_holders(pages[page]) == 1, "written while somebody else reads it"
        content = hash((content, token, self.version))
        request.chain.append(content)
        self.pages[pages[page], offset] = content
        slot.last = (length + 1, content)
        if slot.last[0] % self.config.chunk_tokens == 0:
            slot.chunk = slot.last

    def _prefill(self, part):
        request = self.requests[part.sequence_id]
        tokens = request.prompt + request.output
        chunk, start, end = self.config.chunk_tokens, part.start, part.start + part.num_tokens
        assert part.num_tokens > 0
        assert part.is_last or not part.is_resumed
        assert len(part.pages) == -(-end // chunk)
        if start == 0:
            self.slots[part.slot] = Slot()
        slot = self.slots[part.slot]
        if start >= len(request.chain) or slot.chunk[1] != request.chain[start]:
            request.chain = chain_of(tokens[:start], self.version)  # a hit, of these weights
        request.chain = request.chain[: start + 1]
        assert slot.chunk == (start, request.chain[start])
        slot.last = slot.chunk
        self._assert_holds(part.sequence_id, part.pages, slot.chunk)
        for token in tokens[start:end]:
            self._compute(request, slot, part.pages, token)
        slot.stopped, slot.token = False, None
        if not part.is_last:
            assert end % chunk == 0
            assert end < len(tokens)
            return plan_lib.StepResult()
        if part.is_resumed:
            assert end == len(tokens) - 1 >= len(request.prompt)
            slot.token = tokens[-1]
            return plan_lib.StepResult()
        assert end == len(request.prompt)
        assert not request.output
        return self._sampled(request, slot, ())

    def _sampled(self, request, slot, new):
        """Sample the token after the state; stop where the request says."""
        slot.token = request.next_token(slot.last[0])
        request.output.append(slot.token)
        new = (*new, slot.token)
        slot.stopped = slot.last[0] + 1 >= min(request.stop, request.limit)
        length = slot.last[0] if slot.stopped else None
        return plan_lib.StepResult(len(new), slot.stopped, length, new)

    def _decode(self, row, steps):
        request, slot = self.requests[row.sequence_id], self.slots[row.slot]
        assert row.length_limit == request.limit
        self._assert_holds(row.sequence_id, row.pages, slot.last)
        result = plan_lib.StepResult()
        for _ in range(steps):
            if slot.stopped:
                break
            assert slot.token == (request.prompt + request.output)[slot.last[0]]
            self._compute(request, slot, row.pages, slot.token)
            result = self._sampled(request, slot, result.new_tokens)
        return result


class Driver:
    """Scheduler and device together; every operation checks what must always be true."""

    def __init__(self, **changes):
        sizes = {
            "num_slots": 5,
            "num_pages": 24,
            "max_length": 80,
            "prefill_tokens": (16,),
            "max_prefill_chunks": 3,
            "decode_steps": 6,
            "snapshot_every_tokens": 12,
            "cache_bytes": 400,
            "page_bytes": 3,
            "state_bytes": 20,
            "swap_tokens": 20,
            "host_bytes": 120,
        }
        config, limits = scheduler_support.split_changes(sizes | changes)
        self.config = dataclasses.replace(scheduler_support.CONFIG, **config)
        self.limits = dataclasses.replace(scheduler_support.LIMITS, **limits)
        self.scheduler = scheduler.Scheduler(self.config, self.limits)
        self.memories = [part.memory for part in self.scheduler._partitions]
        self.device = Device(self.config, self.limits, self._count_page_holders)
        self.live, self.outputs = {}, {}
        self.unreported = collections.deque()
        self.submitted = self.finished = self.plans = 0
        self.born, self.longest_wait = {}, 0
        self.host_stops = set()

    def _count_page_holders(self, page):
        return self.memories[page // (self.limits.num_pages + 1)].pages.count_holders(page)

    def submit(
        self, prompt, max_tokens, stop_after, cacheable=True, single_step=False, num_prior=0
    ):
        """Submit a request.

        num_prior: tokens of output that it has from before it was suspended, or as many as leave
        one to make.
        """
        self.submitted += 1
        options = {"is_cacheable": cacheable, "single_step": single_step}
        limit = len(prompt) + max_tokens
        request = Request(list(prompt), limit, len(prompt) + stop_after)
        for _ in range(min(num_prior, max_tokens - 1, stop_after - 1)):
            request.output.append(request.next_token(len(prompt) + len(request.output)))
        if num_prior:
            options["prior_tokens"] = request.output
        try:
            self.scheduler.submit(self.submitted, prompt, max_tokens, **options)
        except plan_lib.QueueFull:
            assert self.scheduler.stats().num_waiting >= self.config.max_queue
            assert not num_prior
            return
        self.live[self.submitted] = self.device.requests[self.submitted] = request
        self.outputs[self.submitted] = list(request.output)
        self.born[self.submitted] = self.plans

    def plan(self):
        partitions = self.scheduler._partitions
        oldest = [part.running[0] for part in partitions if part.running]
        plan = self.scheduler.plan()
        for sequence in oldest:
            # One that came back in this plan.
            first = partitions[sequence.partition].running[0]
            older = first.submission_index < sequence.submission_index
            assert sequence.slot or older, "the oldest was preempted"
        if plan is None:
            assert self.unreported or not self.live, "nothing under way, and yet nothing to do"
            return
        self.plans += 1
        assert all(entry.sequence_id in self.live for entry in plan.entries)
        for row in plan.decode_rows:
            if self.scheduler._sequences[row.sequence_id].single_step:
                assert plan.max_steps == 1
                assert all(row.sequence_id not in results for results in self.unreported)
        self.unreported.append(self.device.run(plan))
        assert len(self.unreported) <= 2

    def report(self):
        if not self.unreported:
            return
        results = self.unreported.popleft()
        for sequence_id in self.host_stops & results.keys():
            if results[sequence_id].num_tokens:  # a stop string: the device knows nothing of it
                results[sequence_id] = dataclasses.replace(
                    results[sequence_id], is_finished=True, final_length=None
                )
        self.scheduler.report(results)
        for sequence_id, result in results.items():
            if sequence_id in self.live:
                self.outputs[sequence_id] += result.new_tokens
                if result.is_finished:
                    self._finish(sequence_id)

    def _finish(self, sequence_id):
        request, output = self.live.pop(sequence_id), self.outputs.pop(sequence_id)
        start = len(request.prompt)
        assert output == [request.next_token(start + i) for i in range(len(output))]
        if sequence_id not in self.host_stops:
            assert len(output) == min(request.stop, request.limit) - start
        self.finished += 1
        self.longest_wait = max(self.longest_wait, self.plans - self.born.pop(sequence_id))

    def cancel(self, sequence_id):
        self.scheduler.cancel(sequence_id)
        self.scheduler.cancel(sequence_id)
        self.live.pop(sequence_id, None)

    def set_key(self, keep_running):
        self.device.version += 1
        self.scheduler.set_cache_key((self.device.version, ""), keep_running)

    def drain(self):
        """Finish everything in as many plans as there are tokens, with room to begin again."""
        most = 50 + 10 * sum(request.limit for request in self.live.values())
        while self.live or self.unreported:
            self.plan()
            self.report()
            self.audit()
            most -= 1
            assert most > 0, f"no end for {list(self.live)}"
        self.plan()  # what is left to drop
        assert not self.device.host
        assert self.scheduler._shared.host_bytes == 0

    def audit(self):
        """Every page and slot is free, or held as often as there are owners in its partition."""
        for part in self.scheduler._partitions:
            self._audit_partition(part)
        assert 0 <= self.scheduler._shared.host_bytes <= self.config.host_bytes

    def _audit_partition(self, part):
        nodes = list(part.memory.cache._iterate_nodes())
        pages = collections.Counter(page for node in nodes for page in node.pages)
        slots = collections.Counter(node.slot for node in nodes)
        for sequence in self.scheduler._sequences.values():
            if sequence.slot and sequence.partition == part.index:
                pages.update(sequence.pages)
                slots.update([sequence.slot])
            assert bool(sequence.slot) == any(
                sequence in other.running for other in self.scheduler._partitions
            )
        assert max(slots.values(), default=0) <= 1
        for pool, holders in ((part.memory.pages, pages), (part.memory.slots, slots)):
            assert pool.num_free + len(holders) == pool.size
            first = part.index * (pool.size + 1) + 1
            own_ids = range(first, first + pool.size)
            assert all(pool.count_holders(member) == holders[member] for member in own_ids)
            assert holders.keys() <= set(own_ids)
        assert part.memory.cache.stats().num_bytes <= self.limits.cache_bytes
        running = [sequence.submission_index for sequence in part.running]
        assert running == sorted(running)
        assert len(running) <= -(-self.config.max_rows // self.limits.num_partitions)
        assert not any(node.pins for node in nodes)


def prompt_of(family, length, tail):
    """Prompts of a family share a prefix of up to 24 tokens, and then differ by their tails."""
    shared = [(family * 5 + i * i) % 3 for i in range(24)]
    return (shared + [10 + tail] * 40)[:length] if tail % 2 else [*shared[:length], 10 + tail]


class Machine(stateful.RuleBasedStateMachine):
    @stateful.initialize(
        num_slots=st.integers(1, 6),
        num_pages=st.integers(18, 30),
        max_rows=st.integers(1, 4),
        cache_bytes=st.sampled_from([0, 100, 400]),
        host_bytes=st.sampled_from([0, 60, 300]),
        every=st.sampled_from([0, 8]),
        num_partitions=st.integers(1, 3),
    )
    def start(self, num_slots, num_pages, max_rows, cache_bytes, host_bytes, every, num_partitions):
        self.driver = Driver(
            num_partitions=num_partitions,
            num_slots=num_slots,
            num_pages=num_pages,
            max_rows=max_rows,
            cache_bytes=cache_bytes,
            host_bytes=host_bytes,
            snapshot_every_tokens=every,
        )

    @stateful.rule(
        family=st.integers(0, 1),
        length=st.integers(1, 48),
        tail=st.integers(0, 3),
        max_tokens=st.integers(1, 24),
        stop_after=st.integers(1, 30),
        cacheable=st.sampled_from([True, True, True, False]),
        single_step=st.sampled_from([False, False, False, True]),
        num_prior=st.sampled_from([0, 0, 0, 1, 2, 9]),
    )
    def submit(
        self, family, length, tail, max_tokens, stop_after, cacheable, single_step, num_prior
    ):
        prompt = prompt_of(family, length, tail)
        self.driver.submit(prompt, max_tokens, stop_after, cacheable, single_step, num_prior)

    @stateful.rule(times=st.integers(1, 6))
    def work(self, times):
        for _ in range(times):
            self.driver.plan()
            self.driver.report()

    @stateful.rule()
    def plan(self):
        self.driver.plan()

    @stateful.rule()
    def report(self):
        self.driver.report()

    @stateful.rule(data=st.data(), operation=st.sampled_from(["cancel", "preempt", "stop"]))
    def disturb(self, data, operation):
        if self.driver.live:
            sequence_id = data.draw(st.sampled_from(sorted(self.driver.live)))
            match operation:
                case "cancel":
                    self.driver.cancel(sequence_id)
                case "preempt":
                    self.driver.scheduler.preempt(sequence_id)
                case "stop":
                    self.driver.host_stops.add(sequence_id)

    @stateful.rule(keep_running=st.booleans())
    def set_key(self, keep_running):
        self.driver.set_key(keep_running)

    @stateful.invariant()
    def audit(self):
        if hasattr(self, "driver"):
            self.driver.audit()

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.drain()


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis.settings(max_examples=60, stateful_step_count=40)


def operate(driver, chance, operations):
    """Do so many random operations, with a queue that is rarely empty."""
    for _ in range(operations):
        draw = chance.random()
        ids = sorted(driver.live)
        if draw < 0.12:
            prompt = prompt_of(chance.randrange(4), chance.randint(1, 48), chance.randrange(6))
            options = {"cacheable": chance.random() < 0.9, "single_step": chance.random() < 0.05}
            options["num_prior"] = chance.choice([0, 0, 0, 0, 1, 5, 20])
            driver.submit(prompt, chance.randint(1, 30), chance.randint(1, 60), **options)
        elif draw < 0.13 and ids:
            driver.cancel(chance.choice(ids))
        elif draw < 0.135 and ids:
            driver.scheduler.preempt(chance.choice(ids))
        elif draw < 0.14 and ids:
            driver.host_stops.add(chance.choice(ids))
        elif draw < 0.141:
            driver.set_key(chance.random() < 0.5)
        elif draw < 0.57:
            driver.plan()
        else:
            driver.report()
        driver.audit()


@pytest.mark.parametrize("num_partitions", [1, 3])
def test_long_run_meets_every_case(num_partitions):
    sizes = {"num_partitions": num_partitions}
    if num_partitions > 1:  # sizes of a partition: two rows each, and as tight as one
        sizes |= {"max_rows": 6, "num_slots": 3, "num_pages": 21, "max_queue": 16}
    driver = Driver(**sizes)
    operate(driver, random.Random(0), 20_000)
    driver.drain()
    stats = driver.scheduler.stats()
    assert driver.finished > 1000
    assert driver.longest_wait < 250
    counts = dataclasses.asdict(stats.memory) | dataclasses.asdict(stats.cache)
    wanted = (
        "swapped_out",
        "swapped_in",
        "restarted",
        "snapshots_copied",
        "snapshots_moved",
        "hits",
        "evicted",
    )
    few = {name: counts[name] for name in wanted if counts[name] < 50}
    assert not few
    assert counts["slots_taken_over"]
    assert counts["snapshots_skipped"]
    assert stats.num_held_back > 50
    assert set(counts["miss_reasons"]) == {
        "empty",
        "no common prefix",
        "no snapshot on the way",
        "shorter than a chunk",
    }

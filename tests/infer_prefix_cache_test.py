"""Pools and the prefix tree: what is found, what it holds, what goes first."""

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st
from scheduler_support import C, chunk_tokens_of

from infer.scheduling import id_pool, prefix_cache

KEY = (0, "bf16")


class Tree:
    """A prefix cache with its pools, written to in words: each letter is a chunk."""

    def __init__(self, num_pages=40, num_slots=12, max_bytes=10_000, page_bytes=1, state_bytes=10):
        self.pages, self.slots = id_pool.IdPool(num_pages), id_pool.IdPool(num_slots)
        self.cache = prefix_cache.PrefixCache(
            self.pages,
            self.slots,
            chunk_tokens=C,
            page_bytes=page_bytes,
            state_bytes=state_bytes,
            max_bytes=max_bytes,
        )

    def insert(self, word, keep=False, key=KEY):
        """Insert as a request does that ends, or go on holding its pages."""
        pages = self.pages.allocate(len(word))
        (slot,) = self.slots.allocate(1)
        self.cache.insert(key, chunk_tokens_of(word), pages, slot)
        if not keep:
            self.pages.release(pages)
        return pages, slot

    def find(self, word, limit=None, key=KEY):
        hit = self.cache.lookup(
            key, chunk_tokens_of(word), len(word) * C if limit is None else limit
        )
        return hit.length // C, hit.common_tokens // C

    def evictable(self):
        loose = [node for node in self.cache._iterate_nodes() if not node.pins]
        num_holders = [self.pages.count_holders(page) for node in loose for page in node.pages]
        return num_holders.count(1), len(loose)

    def stats(self):
        return self.cache.stats()


def test_pool_gives_the_lowest_and_counts_holders():
    pool = id_pool.IdPool(4)
    assert pool.allocate(3) == [1, 2, 3]
    pool.add_holders([2])
    pool.release([1, 2, 3])
    assert (pool.num_free, pool.count_holders(2)) == (3, 1)
    assert pool.allocate(2) == [1, 3]
    with pytest.raises(RuntimeError, match="got 1 free of 4, wanted 2; evict first"):
        pool.allocate(2)
    with pytest.raises(RuntimeError, match="got id 4, which is free"):
        pool.release([4])
    with pytest.raises(RuntimeError, match="got id 4, which is free"):
        pool.add_holders([4])


def test_the_deepest_snapshot_within_the_limit_is_found():
    tree = Tree()
    tree.insert("ab")
    tree.insert("abcd")
    assert tree.find("abcdx") == (4, 4)
    assert tree.find("abcd", limit=4 * C - 1) == (2, 4)
    assert tree.find("abcx") == (2, 3)
    assert tree.find("x") == (0, 0)


def test_a_hit_brings_the_pages_of_the_whole_prefix():
    tree = Tree()
    first, _ = tree.insert("ab", keep=True)
    second, slot = tree.insert("abcd", keep=True)
    hit = tree.cache.match(KEY, chunk_tokens_of("abcdx"), 5 * C - 1)
    assert hit.pages == (*first, *second[2:])
    assert (hit.slot, hit.cache_miss_reason) == (slot, "")
    assert [tree.pages.count_holders(page) for page in second] == [1, 1, 2, 2]


def test_a_part_of_a_chunk_does_not_count():
    tree = Tree()
    tree.insert("ab")
    tokens = chunk_tokens_of("ab")
    tokens[-1] += 1
    hit = tree.cache.lookup(KEY, tokens, len(tokens))
    assert (hit.length, hit.common_tokens) == (0, C)


def test_branches_share_nothing_until_there_is_a_snapshot_where_they_part():
    tree = Tree()
    first, _ = tree.insert("abc")
    tree.insert("abd")
    assert tree.stats().num_pages == 6
    assert tree.find("abe") == (0, 2)
    tree.insert("ab")
    assert tree.stats().num_pages == 4
    assert tree.find("abe") == (2, 2)
    assert tree.find("abd") == (3, 3)
    hit = tree.cache.lookup(KEY, chunk_tokens_of("abc"), 12)
    assert hit.pages == tuple(first)


def test_a_second_snapshot_of_the_same_is_released():
    tree = Tree()
    tree.insert("ab")
    tree.insert("ab")
    assert (tree.stats().num_nodes, tree.slots.num_free, tree.pages.num_free) == (1, 11, 38)


def test_a_split_keeps_the_pins_of_the_hits_below():
    tree = Tree()
    tree.insert("abcd")
    hit = tree.cache.match(KEY, chunk_tokens_of("abcd"), 16)
    tree.insert("ab")
    assert tree.evictable() == (0, 0)
    tree.cache.release(hit)
    assert tree.evictable() == (4, 2)
    with pytest.raises(RuntimeError, match="released before"):
        tree.cache.release(hit)


def test_reasons_of_a_miss():
    tree = Tree()
    match = tree.cache.match
    assert match(KEY, chunk_tokens_of("ab"), 8).cache_miss_reason == "empty"
    tree.insert("abc")
    assert match(KEY, chunk_tokens_of("ab"), 3).cache_miss_reason == "shorter than a chunk"
    assert match(KEY, chunk_tokens_of("xy"), 8).cache_miss_reason == "no common prefix"
    assert match(KEY, chunk_tokens_of("abx"), 12).cache_miss_reason == "no snapshot on the way"
    assert match(("other", ""), chunk_tokens_of("abc"), 12).cache_miss_reason == "empty"
    assert match(KEY, chunk_tokens_of("abcd"), 15).cache_miss_reason == ""
    stats = tree.stats()
    assert (stats.hits, stats.misses, stats.hit_tokens) == (1, 5, 12)
    assert sum(stats.miss_reasons.values()) == 5


def test_no_bytes_switch_it_off():
    tree = Tree(max_bytes=0)
    tree.insert("ab")
    assert tree.stats().num_nodes == 0
    assert tree.slots.num_free == 12
    assert tree.cache.match(KEY, chunk_tokens_of("abc"), 11).cache_miss_reason == "off"


def test_the_byte_budget_holds_by_evicting_the_cheapest():
    tree = Tree(num_pages=50, max_bytes=40)
    tree.insert("abcdefgh")  # 18 bytes
    tree.insert("x")  # 11 bytes for 4 tokens
    tree.insert("yz")
    assert tree.stats().num_bytes == 30
    assert tree.find("x") == (0, 0)
    assert tree.find("yz") == (2, 2)
    tree.insert("k" * 31)  # 41 bytes would never fit
    assert tree.find("k" * 31) == (0, 0)
    assert tree.stats().num_bytes == 30


def test_few_tokens_per_byte_go_first():
    tree = Tree()
    tree.insert("x")
    tree.insert("abcdef")
    tree.insert("yz")
    for gone in ("x", "yz", "abcdef"):
        for word in ("x", "abcdef", "yz"):  # all used just now
            tree.cache.release(tree.cache.match(KEY, chunk_tokens_of(word), 99))
        assert tree.find(gone)[0]
        assert tree.cache.evict(slots=tree.slots.num_free + 1)
        assert tree.find(gone) == (0, 0)


def test_what_was_not_used_for_long_goes_before_what_was():
    tree = Tree()
    tree.insert("abcd")
    tree.insert("xyz")
    for _ in range(5):
        tree.cache.release(tree.cache.match(KEY, chunk_tokens_of("xyz"), 99))
    assert tree.cache.evict(slots=tree.slots.num_free + 1)
    assert tree.find("abcd") == (0, 0)
    assert tree.find("xyz") == (3, 3)


def test_an_inner_node_goes_by_giving_its_span_to_its_only_child():
    tree = Tree(state_bytes=1000)
    tree.insert("a")
    tree.insert("abcdefgh")
    assert tree.cache.evict(slots=11)
    assert tree.find("abcdefgh") == (8, 8)
    assert tree.find("ax") == (0, 1)
    assert tree.pages.num_free == 32


def test_no_inner_node_goes_for_pages():
    tree = Tree(state_bytes=1000)
    tree.insert("a")
    tree.insert("abcdefgh")
    assert tree.cache.evict(pages=36)
    assert tree.find("abcdefgh") == (1, 1)


def test_shared_pages_are_not_counted_as_gain():
    tree = Tree(num_pages=10)
    pages, _ = tree.insert("abcd", keep=True)
    tree.insert("xyz")
    assert tree.evictable() == (3, 2)
    assert not tree.cache.evict(pages=7)
    assert tree.stats().num_nodes == 2  # nothing is lost for nothing
    assert tree.cache.evict(pages=6)
    assert tree.find("abcd") == (4, 4)
    tree.pages.release(pages)
    assert tree.cache.evict(pages=10)


def test_leaves_without_gain_go_when_they_are_in_the_way():
    tree = Tree(num_pages=10, state_bytes=1)
    tree.insert("abc")
    pages, _ = tree.insert("abcd", keep=True)
    assert tree.evictable() == (3, 2)
    assert tree.cache.evict(pages=6)
    assert tree.stats().num_nodes == 0
    assert tree.pages.num_free == 10 - len(pages)


def test_pinned_nodes_and_their_ancestors_stay():
    tree = Tree()
    tree.insert("a")
    tree.insert("ab")
    tree.insert("xy")
    hit = tree.cache.match(KEY, chunk_tokens_of("ab"), 8)
    assert not tree.cache.evict(slots=12)
    assert tree.cache.evict(slots=10)
    assert tree.find("ab") == (2, 2)
    assert tree.find("xy") == (0, 0)
    tree.cache.release(hit)
    assert tree.cache.evict(slots=12, pages=40)


def test_dearer_nodes_stay_for_a_cheaper_snapshot():
    tree = Tree(num_slots=2)
    tree.insert("abcdef")
    tree.insert("xyz")
    assert not tree.cache.evict(
        slots=1, max_value=tree.cache.snapshot_value(KEY, chunk_tokens_of("k")) / 10
    )
    assert tree.stats().num_nodes == 2
    assert tree.cache.evict(
        slots=1, max_value=tree.cache.snapshot_value(KEY, chunk_tokens_of("klmnopqrs"))
    )
    assert tree.stats().num_nodes == 1


def test_a_snapshot_that_is_there_is_worth_nothing_more():
    tree = Tree()
    tree.insert("ab")
    assert tree.cache.snapshot_value(KEY, chunk_tokens_of("ab")) == 0
    assert tree.cache.snapshot_value(KEY, chunk_tokens_of("abcd")) == 8 / 12
    assert tree.cache.snapshot_value(KEY, chunk_tokens_of("xbcd")) == 16 / 14


def test_a_hit_can_be_taken_over():
    tree = Tree(num_slots=2)
    tree.insert("a")
    _, slot = tree.insert("abc")
    hit = tree.cache.match(KEY, chunk_tokens_of("abcd"), 12)
    tree.pages.add_holders(hit.pages)
    assert tree.cache.take_over(hit) == slot
    assert tree.slots.count_holders(slot) == 1
    assert tree.find("abc") == (1, 1)
    assert [tree.pages.count_holders(page) for page in hit.pages] == [2, 1, 1]


def test_a_hit_with_nodes_below_cannot_be_taken_over():
    tree = Tree()
    tree.insert("a")
    tree.insert("abc")
    hit = tree.cache.match(KEY, chunk_tokens_of("a"), 4)
    with pytest.raises(RuntimeError, match="evict first"):
        tree.cache.take_over(hit)


def test_drop_forgets_one_key():
    tree = Tree()
    tree.insert("abc")
    tree.insert("ab")
    tree.insert("ab", key=(1, "bf16"))
    tree.cache.drop_key(KEY)
    tree.cache.drop_key(KEY)
    assert tree.find("abc") == (0, 0)
    assert tree.find("ab", key=(1, "bf16")) == (2, 2)
    assert (tree.pages.num_free, tree.slots.num_free) == (38, 11)


def test_wrong_lengths_are_refused():
    tree = Tree()
    with pytest.raises(ValueError, match="got 5 tokens and 1 pages; wanted a multiple of 4"):
        tree.cache.insert(KEY, [1] * 5, [1], 1)
    with pytest.raises(ValueError, match="got 8 tokens and 1 pages"):
        tree.cache.insert(KEY, [1] * 8, [1], 1)


WORDS = st.text("ab", min_size=1, max_size=6)


class Machine(stateful.RuleBasedStateMachine):
    """The tree against a plain list of snapshots, and pages against what was written to them."""

    def __init__(self):
        super().__init__()
        self.tree = Tree(num_pages=16, num_slots=6, max_bytes=75)
        self.words = {}  # of each snapshot, by slot
        self.written = {}  # the word up to and with each page
        self.hits = []
        self.running = []

    def forget(self):
        self.words = {s: word for s, word in self.words.items() if self.tree.slots.count_holders(s)}

    def best(self, word, limit):
        known = [prefix for prefix in self.words.values() if word.startswith(prefix)]
        return max([len(prefix) for prefix in known if len(prefix) * C <= limit], default=0)

    @stateful.rule(word=WORDS, keep=st.booleans())
    def insert(self, word, keep):
        if self.tree.slots.num_free and self.tree.pages.num_free >= len(word):
            new = word not in self.words.values()
            pages = self.tree.pages.allocate(len(word))
            (slot,) = self.tree.slots.allocate(1)
            self.written |= {page: word[: i + 1] for i, page in enumerate(pages)}
            assert self.tree.cache.insert(KEY, chunk_tokens_of(word), pages, slot) == new
            if new:
                self.words[slot] = word
            if keep:
                self.running.append(pages)
            else:
                self.tree.pages.release(pages)
        self.forget()

    @stateful.rule(word=WORDS, less=st.integers(0, 5), keep=st.booleans())
    def match(self, word, less, keep):
        limit = len(word) * C - less
        hit = self.tree.cache.match(KEY, chunk_tokens_of(word), limit)
        assert hit.length == self.best(word, limit) * C
        assert (hit.cache_miss_reason == "") == (hit.length > 0)
        assert [self.written[page] for page in hit.pages] == [
            word[: i + 1] for i in range(hit.length // C)
        ]
        if hit.node:
            assert self.words[hit.slot] == word[: hit.length // C]
            self.hits.append(hit)
            if not keep:
                self.release()

    @stateful.precondition(lambda self: self.hits)
    @stateful.rule()
    def release(self):
        self.tree.cache.release(self.hits.pop(0))

    @stateful.precondition(lambda self: self.running)
    @stateful.rule()
    def end(self):
        self.tree.pages.release(self.running.pop(0))

    @stateful.rule(pages=st.integers(0, 16), slots=st.integers(0, 6))
    def evict(self, pages, slots):
        before = dict(self.words)
        loose = self.tree.evictable()
        most = self.tree.pages.num_free + loose[0], self.tree.slots.num_free + loose[1]
        was_freed = self.tree.cache.evict(pages, slots)
        assert was_freed == (most[0] >= pages and most[1] >= slots)
        if was_freed:
            assert self.tree.pages.num_free >= pages
            assert self.tree.slots.num_free >= slots
        self.forget()
        assert was_freed or self.words == before
        assert all(self.tree.slots.count_holders(hit.slot) for hit in self.hits)

    @stateful.invariant()
    def audit(self):
        tree = self.tree
        assert tree.stats().num_slots == len(self.words) == tree.slots.size - tree.slots.num_free
        assert tree.stats().num_bytes <= 75 or self.hits
        assert len(set(self.words.values())) == len(self.words)
        used = {page for node in tree.cache._iterate_nodes() for page in node.pages}
        used |= {page for pages in self.running for page in pages}
        assert tree.pages.num_free + len(used) == tree.pages.size
        prefixes = {word[:i] for word in self.words.values() for i in range(1, len(word) + 1)}
        for word in prefixes:
            hit = tree.cache.lookup(KEY, chunk_tokens_of(word), len(word) * C)
            assert hit.length == self.best(word, hit.common_tokens) * C
            assert hit.common_tokens == len(word) * C

    def teardown(self):
        while self.hits:
            self.release()
        while self.running:
            self.end()
        assert self.tree.cache.evict(16, 6)


TestMachine = Machine.TestCase
TestMachine.settings = hypothesis.settings(max_examples=60, stateful_step_count=40)

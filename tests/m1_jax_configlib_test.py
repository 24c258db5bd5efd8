"""Config files: overrides by path, JSON there and back, and errors in words."""

import dataclasses
import itertools

import pytest

from m1_jax import configlib


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    name: str | None = None
    pairs: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inners: tuple[Inner, ...] = (Inner(), Inner(rate=0.2))
    one: Inner = Inner()
    maybe: Inner | None = None
    number: int = 3
    flag: bool = False


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("number=7", lambda c: c.number, 7),
        ("number=1e6", lambda c: c.number, 1_000_000),
        ("one.rate=2", lambda c: c.one.rate, 2.0),
        ("one.name=abc", lambda c: c.one.name, "abc"),
        ("one.name=None", lambda c: c.one.name, None),
        ("flag=True", lambda c: c.flag, True),
        ("inners.1.rate=0.5", lambda c: c.inners[1].rate, 0.5),
        ("inners.-1.pairs=[('a', 2)]", lambda c: c.inners[1].pairs, (("a", 2),)),
        ("maybe={'rate': 3}", lambda c: c.maybe, Inner(rate=3.0)),
    ],
)
def test_overrides_replace_one_value_of_its_own_type(override, path, value):
    got = path(configlib.apply_override(Outer(), override))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nunber=7", "did you mean number"),
        ("number=x", "got 'x'; wanted int"),
        ("number=True", "got True; wanted int"),
        ("flag=1", "got 1; wanted bool"),
        ("inners.2.rate=1", "wanted one of the 2 items"),
        ("number.x=1", "has no fields"),
        ("number", "wanted FIELD=VALUE"),
        ("one={'rat': 1}", "did you mean rate"),
    ],
)
def test_wrong_overrides_are_refused_in_words(override, words):
    with pytest.raises(configlib.ConfigFileError, match=words):
        configlib.apply_override(Outer(), override)


@dataclasses.dataclass(frozen=True)
class Bounds:
    low: int = 0
    high: int = 10

    def __post_init__(self):
        configlib.check_field(self.low <= self.high, "low", self.low, f"at most {self.high}")


@dataclasses.dataclass(frozen=True)
class Tree:
    bounds: tuple[Bounds, ...] = (Bounds(),)
    most: int = 10

    def __post_init__(self):
        highest = max(bounds.high for bounds in self.bounds)
        configlib.check_field(highest <= self.most, "most", self.most, f"at least {highest}")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_overrides_does_not_matter(order):
    overrides = ["bounds.0.low=50", "bounds.0.high=60", "most=70"]
    got = configlib.apply_overrides(Tree(), [overrides[i] for i in order])
    assert got == Tree((Bounds(50, 60),), 70)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bounds.0.low=50", "most=70"], "low: got 50; wanted at most 10"),
        (["most=70", "bounds.0.high=80"], "most: got 70; wanted at least 80"),
        (["bounds.0.low=5", "bounds.0.low=50"], "low: got 50; wanted at most 10"),
    ],
)
def test_what_all_overrides_give_together_is_checked(overrides, words):
    with pytest.raises(ValueError, match=words):
        configlib.apply_overrides(Tree(), overrides)


def test_overrides_leave_their_config_as_it_is():
    tree = Tree()
    configlib.apply_overrides(tree, ["bounds.0.low=5", "most=70"])
    assert tree == Tree()
    assert configlib.apply_overrides(tree, []) is tree


def test_json_round_trip_and_differences():
    config = Outer(maybe=Inner(name="x", pairs=(("a", 1),)), flag=True)
    assert configlib.from_json(Outer, configlib.to_json(config)) == config
    changed = configlib.apply_override(config, "inners.0.rate=9.0")
    assert configlib.list_differences(config, changed) == ["inners.0.rate: 0.1 -> 9.0"]
    assert configlib.list_differences(config, config) == []


def test_files(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config(arg=''):\n    return arg or 'none'\n")
    assert configlib.load_config(str(file)) == "none"
    assert configlib.load_config(f"{file}:some") == "some"
    with pytest.raises(configlib.ConfigFileError, match="wanted a file"):
        configlib.load_config(str(tmp_path / "missing.py"))
    file.write_text("x = 1\n")
    with pytest.raises(configlib.ConfigFileError, match="no function get_config"):
        configlib.load_config(str(file))


@pytest.mark.parametrize("path", ["number", "one", "one.rate", "inners", "inners.1.name", "maybe"])
def test_paths_of_fields_are_known(path):
    configlib.check_path(Outer(), path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nunber", "did you mean number"),
        ("one.rat", "did you mean rate"),
        ("inners.2", "wanted one of the 2 items"),
        ("inners.-1", "wanted one of the 2 items"),
        ("number.x", "wanted the path before it"),
        ("maybe.rate", "wanted the path before it"),
        ("", "has no field ''"),
    ],
)
def test_paths_of_no_field_are_refused(path, words):
    with pytest.raises(configlib.ConfigFileError, match=words):
        configlib.check_path(Outer(), path)

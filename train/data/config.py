"""Schemas of the data: what a run reads, and what a stream of batches consists of.

A config file states a `DataConfig`. The stage and the run add the other fields of a `StreamConfig`.
"""

import bisect
import dataclasses
import re

from m1_jax import configlib
from train.data import chat

BAD_RECORD_MODES = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Files whose records are drawn together.

    Attributes:
      name: letters, digits, `_`, `-` and `.`. Metrics and checkpoints call the source by this name.
      path: a file, a folder or a pattern, see `find_files.find_files`.
      kind: kind of every record, one of `chat.RECORD_KINDS`.
      weight: share of the tokens, up to the sum of all weights, at least 0. It counts where
        `DataConfig.weights` is empty.
    """

    name: str
    path: str
    kind: str = "auto"
    weight: float = 1.0

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"source: got the name {self.name!r}; wanted letters, digits, _ - .")
        _check_choice(f"source {self.name!r}: kind", self.kind, chat.RECORD_KINDS)
        # `not >=` refuses NaN as well, here and below.
        if not self.weight >= 0:
            raise ValueError(
                f"source {self.name!r}: got the weight {self.weight}; wanted 0 or more"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and how records become rows.

    Attributes:
      sources: what to read, at least one.
      weights: (first step, ((source, weight), ...)) in ascending steps from 0. A weight is a
        source's share of the tokens, up to the sum of all. A source that is not named has weight 0.
        New weights decide what is drawn from their step on. Up to lanes * lookahead documents were
        drawn before and come first. Empty takes the sources' own weights for the whole run.
      pack: put several documents in a row. False puts one in a row, and padding.
      overlong: what becomes of conversations longer than a row: "error", "drop" or "split". Texts
        are always split.
      bad_records: what becomes of records that cannot be used, such as damaged or empty ones.
        "error" ends the run with the first one. "skip" leaves them out, and each is counted and
        printed with its file and line.
      max_bad_share: largest share of a source's records that "skip" leaves out, 0 to 1. More of
        them end the run.
      thinking: "keep" or "drop", see `chat`.
      profile: profile of the chat template, see `infer.prompt`.
      begin_token: control token before each text, or None.
      end_token: control token after each text, or None.
      workers: processes that tokenise and pack. 0 is a thread of the trainer's process. The rows
        are the same for any number.
      prefetch: batches that each worker makes ahead, at least 1.
      lanes: independent readers, see `mixture`. A multiple or a divisor of the rows of every stage.
        Fewer lanes than rows cost time where a lane's rows lie on several hosts: each of them makes
        all rows of the lane. The number is fixed for a run, while row length, rows, weights and the
        number of hosts may change at any checkpoint.
      lookahead: documents that a lane's packer chooses from, at least 1.
    """

    sources: tuple[DataSource, ...]
    weights: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = ()
    pack: bool = True
    overlong: str = "error"
    bad_records: str = "error"
    max_bad_share: float = 0.01
    thinking: str = "keep"
    profile: str = "release"
    begin_token: str | None = "<begin_of_document>"
    end_token: str | None = "<end_of_document>"
    workers: int = 0
    prefetch: int = 2
    lanes: int = 64
    lookahead: int = 64

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: got {names}; wanted at least one, of different names")
        _check_at_least(self, {"workers": 0, "prefetch": 1, "lanes": 1, "lookahead": 1})
        _check_choice("overlong", self.overlong, chat.OVERLONG_MODES)
        _check_choice("bad_records", self.bad_records, BAD_RECORD_MODES)
        is_share = 0 <= self.max_bad_share <= 1
        configlib.check_field(is_share, "max_bad_share", self.max_bad_share, "a share, 0 to 1")
        _check_choice("thinking", self.thinking, chat.THINKING_MODES)
        _check_choice("profile", self.profile, chat.PROFILES)
        self._check_weights(names)

    def _check_weights(self, names: list[str]) -> None:
        steps = [step for step, _ in self.weights]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"weights: got the steps {steps}; wanted ascending ones from 0")
        # Without weights by step, the sources' own are checked.
        for step, weights in self.weights or ((0, self.weights_at(0).items()),):
            for name, weight in weights:
                if name not in names or not weight >= 0:
                    raise ValueError(
                        f"weights from step {step}: got {name!r}: {weight}; wanted 0 or more for "
                        f"one of {', '.join(names)}"
                    )
            if not sum(weight for _, weight in weights) > 0:
                raise ValueError(f"weights from step {step}: got none above 0; wanted one")

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights of a step by source. Sources without an entry have weight 0."""
        if not self.weights:
            return {source.name: source.weight for source in self.sources}
        interval = bisect.bisect_right([first for first, _ in self.weights], step) - 1
        return dict(self.weights[interval][1])


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What a stream of batches consists of.

    Attributes:
      data: what to read.
      seq_len: T, tokens in a row, at least 2.
      rows: rows in a global batch, at least 1.
      seed: seed of the order of documents.
    """

    data: DataConfig
    seq_len: int
    rows: int
    seed: int = 0

    def __post_init__(self):
        _check_at_least(self, {"seq_len": 2, "rows": 1})
        lanes = self.data.lanes
        # Every row then has as many lanes as any other, or every lane as many rows.
        if lanes % self.rows and self.rows % lanes:
            raise ValueError(
                f"lanes: got {lanes} with {self.rows} rows; wanted a multiple or a divisor "
                f"of the rows, such as {max(1, round(lanes / self.rows)) * self.rows}"
            )


def _check_at_least(config: DataConfig | StreamConfig, minima: dict[str, int]) -> None:
    for field, minimum in minima.items():
        value = getattr(config, field)
        configlib.check_field(value >= minimum, field, value, f"at least {minimum}")


# Messages begin with the field, and name the source where several have the field.
def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    configlib.check_field(value in choices, field, value, f"one of {', '.join(choices)}")

"""What an engine refuses, found before anything runs. No device and no weights are needed.

checker = request_check.RequestChecker(tokenizer, model_config.vocab_size, sizes)
checker.check(prompt, options)  # ValueError
"""

import operator
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from infer import config as config_lib
from infer import grammar, stopping
from infer import options as options_lib
from infer.scheduling import plan as plan_lib
from m1_jax import tokenizer as tokenizer_lib


class CheckedRequest(NamedTuple):
    """A request that an engine can serve.

    Attributes:
      prompt: token ids.
      stop_ids: the token ids at which the device ends the output, `MAX_STOP_IDS` at most.
      progress: at the output's beginning.
      matcher: likewise. None without a constraint.
    """

    prompt: tuple[int, ...]
    stop_ids: tuple[int, ...]
    progress: stopping.OutputProgress
    matcher: grammar.GrammarMatcher | grammar.StopTokenBan | None


class OptionsChecker:
    """Checks what a request asks for, for one model and tokenizer. Any thread may ask.

    Args:
      tokenizer: the model's. It may have more ids than the model: these are never chosen.
      vocab_size: the model's.
    """

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiler: grammar.GrammarCompiler | None = None
        self._compiled_constraints: set[str] = set()
        self._lock = threading.Lock()

    def check(self, options: options_lib.Options) -> None:
        """Check options. Equal constraints are compiled once.

        Raises:
          ValueError: options that cannot be served.
        """
        options_lib.check_options(options, self._vocab_size)
        self.make_progress(options)
        constraint = repr((options.constraint, getattr(options, options.constraint or "", None)))
        if constraint not in self._compiled_constraints:
            self.make_matcher(options)
            self._compiled_constraints.add(constraint)

    def make_progress(self, options: options_lib.Options) -> stopping.OutputProgress:
        """Return the progress of an output that begins."""
        return stopping.OutputProgress(options, self._tokenizer)

    def make_matcher(
        self, options: options_lib.Options
    ) -> grammar.GrammarMatcher | grammar.StopTokenBan | None:
        """Return what says which tokens an output that begins may have, None for all of them.

        Raises:
          ValueError: a constraint that cannot be applied.
        """
        if options.constraint is not None:
            with self._lock:
                # Only now: reading the release's vocabulary takes a second or two, and a tokenizer
                # that constraints cannot be read off is good enough for other requests.
                if self._compiler is None:
                    self._compiler = grammar.GrammarCompiler(self._tokenizer, self._vocab_size)
            return self._compiler.compile_matcher(options)
        stop_ids = options_lib.all_stop_ids(options, self._tokenizer.stop_ids)
        # The device forbids early stop tokens by itself, but knows no more than these.
        if options.min_tokens and len(stop_ids) > options_lib.MAX_STOP_IDS:
            return grammar.StopTokenBan(stop_ids, self._vocab_size, options.min_tokens)
        return None


class RequestChecker:
    """Checks requests for one model, tokenizer and engine. Any thread may ask.

    Args:
      tokenizer, vocab_size: as of `OptionsChecker`.
      config: sizes of the engine.
    """

    def __init__(
        self,
        tokenizer: tokenizer_lib.Tokenizer,
        vocab_size: int,
        config: config_lib.EngineConfig,
    ):
        self._tokenizer, self._vocab_size, self._config = tokenizer, vocab_size, config
        self.options_checker = OptionsChecker(tokenizer, vocab_size)

    def check(self, prompt: Iterable[Any], options: options_lib.Options) -> CheckedRequest:
        """Return what an engine makes of a request before it runs.

        Args:
          prompt: token ids: a list, or an array of NumPy, JAX or PyTorch.
          options: how the prompt is continued.

        Raises:
          ValueError: options or ids that cannot be served, or a request that is too long.
        """
        ids = plain_token_ids(prompt, self._vocab_size)
        # The partitions of a mesh have pages for as long a sequence as one partition of all pages.
        plan_lib.check_length(self._config, self._config.total_pages, len(ids), options.max_tokens)
        options_lib.check_options(options, self._vocab_size)
        progress = self.options_checker.make_progress(options)
        stop_ids = options_lib.all_stop_ids(options, self._tokenizer.stop_ids)
        device_ids = stop_ids[: options_lib.MAX_STOP_IDS]
        matcher = self.options_checker.make_matcher(options)
        return CheckedRequest(ids, device_ids, progress, matcher)


def plain_token_ids(
    tokens: Iterable[Any], vocab_size: int, name: str = "prompt"
) -> tuple[int, ...]:
    """Return token ids as Python's integers.

    Args:
      tokens: a sequence, or an array.
      vocab_size: the model's.
      name: what the error calls them.

    Raises:
      ValueError: what is no token id of the vocabulary.
    """
    values = options_lib.plain_value(tokens)
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise ValueError(f"{name}: got {values!r:.80}; wanted a sequence of token ids")
    ids = []
    for value in values:
        if not options_lib.is_token_id(value, vocab_size):
            raise ValueError(
                f"{name}: got token id {value!r:.80}; wanted 0 to {vocab_size - 1}. "
                "Does the tokenizer belong to this model?"
            )
        ids.append(operator.index(value))  # a list may hold integers of arrays
    return tuple(ids)

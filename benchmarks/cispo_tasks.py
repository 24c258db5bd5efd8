"""The tasks of `cispo_vs_dapo.py`: sums with a rare first token, and models tuned on them.

A task is six digits, and its answer is the last digit of their sum. The model may answer at once,
which a small model gets right hardly more often than by chance. Or it may write `W` and the running
sums first, after which the answer is easy. Fine-tuning sets how often the model begins with `W`,
the fork that reinforcement learning meets. An answer is right or wrong, with nothing in between.
"""

import json
import math
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from infer import prompt
from m1_jax import config as model_config
from m1_jax import logprobs
from m1_jax import params as params_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib
from train import config as config_lib
from train import export, sft

FORK = "W"
ANSWER = "\nAnswer: "
DIGITS = 6
# How often a tuned model begins with W: a token that is rare, and one that is not.
FORK_SHARES = {"a": 0.02, "b": 0.5}
PROMPT_TOKENS, ANSWER_TOKENS = 13, 19  # a row of 32 holds two short samples or a long one
TASKS, TASKS_SEED = 4096, 3
_NUM_CONVERSATIONS = 50_000  # of each fine-tuning stage
_LEARN_SHARE = 0.8  # conversations of the first stage that do the work
_ROWS, _LENGTH = 8, 128
_SPECIAL = (
    "<begin_of_document>",
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<end_of_document>",
)
# Texts of the template and of an answer that are one token each, so that a sample is short.
_WORDS = ("user name=user\n", "ai name=assistant\n", ANSWER)

MODEL = model_config.ModelConfig(
    vocab_size=264,
    hidden_size=64,
    layer_types=(model_config.LIGHTNING,) * 7 + (model_config.SOFTMAX,),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=96,
    num_local_experts=4,
    num_experts_per_tok=2,
    postnorm=True,
    # The release's (2 L)^(1/4) for L = 8 layers instead of 80.
    layernorm_linear_attention_alpha=2.0,
    layernorm_full_attention_alpha=2.0,
    layernorm_mlp_alpha=2.0,
    initializer_range=0.1,  # the release's 0.02 is too small for this width
    max_position_embeddings=4096,
)


def draw_problem(rng: random.Random) -> tuple[str, str]:
    """Return six digits, and the last digit of their sum."""
    digits = [rng.randrange(10) for _ in range(DIGITS)]
    return "".join(map(str, digits)), str(sum(digits) % 10)


def format_answer(digits: str, label: str, work: bool) -> str:
    """Return the answer that fine-tuning teaches, after the work or alone."""
    if not work:
        return ANSWER + label
    sums = [sum(map(int, digits[: i + 1])) % 10 for i in range(len(digits))]
    return FORK + "".join(map(str, sums)) + ANSWER + label


def write_tokenizer(directory: pathlib.Path | str) -> pathlib.Path:
    """Write a tokenizer of bytes and a few words, with one token a digit and 263 in all."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={char: i for i, char in enumerate(sorted(alphabet))}, merges=[])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    words = [tokenizers.AddedToken(word, normalized=False, special=False) for word in _WORDS]
    library.add_tokens(words)
    library.add_special_tokens(list(_SPECIAL))
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<end_of_sentence>", "tokenizer_class": "GPT2Tokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return directory


def count_parameters() -> int:
    """Return the model's number of parameters."""
    model = params_lib.abstract_model(MODEL, jnp.float32, jnp.float32)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))


def measure_fork(directory: pathlib.Path, num_problems: int = 256) -> tuple[float, float]:
    """Return the mean probabilities of W as the first token, and of all right work after it."""
    model = load_lib.load(directory, jnp.float32, None, param_dtype=jnp.float32)
    tokenizer, rng = tokenizer_lib.Tokenizer.load(directory), random.Random(5)
    rows = []
    for _ in range(num_problems):
        digits, label = draw_problem(rng)
        prompt_ids = prompt.encode_prompt(tokenizer, [{"role": "user", "content": digits}])
        rows.append(prompt_ids + tokenizer.encode(format_answer(digits, label, True)))
    tokens = jnp.asarray(rows)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.hidden(tokens, jnp.ones_like(tokens), positions)
    logp = logprobs.token_logprobs(model, hidden, jnp.roll(tokens, -1, axis=1)).logp
    # A token's probability is that of the position before it.
    answer_probs = np.exp(np.asarray(logp)[:, PROMPT_TOKENS - 1 : -1])
    return float(answer_probs[:, 0].mean()), float(answer_probs[:, 1:].prod(axis=1).mean())


def fork_id(directory: pathlib.Path | str) -> int:
    """Return the id of W."""
    (token_id,) = tokenizer_lib.Tokenizer.load(directory).encode(FORK)
    return token_id


def write_tasks(path: pathlib.Path, num_tasks: int, seed: int) -> None:
    """Write tasks as JSON lines."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_tasks):
        digits, label = draw_problem(rng)
        lines.append(json.dumps({"prompt": digits, "label": label}))
    path.write_text("\n".join(lines) + "\n")


def write_conversations(
    path: pathlib.Path, num_conversations: int, share: float, seed: int
) -> None:
    """Write conversations that do the work with the probability `share` each."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_conversations):
        digits, label = draw_problem(rng)
        answer = format_answer(digits, label, rng.random() < share)
        messages = [
            {"role": "user", "content": digits},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


def tune_model(
    directory: pathlib.Path, share: float, learn_steps: int, set_steps: int
) -> pathlib.Path:
    """Return a checkpoint that begins with W in about `share` of its answers, made if missing.

    The tasks and the tokenizer lie beside the checkpoint.

    Args:
      learn_steps: steps of the first stage, most of whose answers do the work, to learn the work.
      set_steps: steps of the second stage, of whose answers `share` do.
    """
    tuned = directory / "tuned"
    if tuned.exists():
        return tuned
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("run", "part"):  # leftovers of a run that was stopped
        shutil.rmtree(directory / name, ignore_errors=True)
    write_tokenizer(directory / "tokenizer")
    write_tasks(directory / "tasks.jsonl", TASKS, TASKS_SEED)
    write_conversations(directory / "learn.jsonl", _NUM_CONVERSATIONS, _LEARN_SHARE, seed=1)
    write_conversations(directory / "set.jsonl", _NUM_CONVERSATIONS, share, seed=2)
    sft.run(_make_config(directory, learn_steps, set_steps), directory / "run")
    export.run(directory / "run", directory / "part", dtype="float32")
    # Renamed last, so that a checkpoint under its final name is complete.
    (directory / "part").rename(tuned)
    return tuned


def _make_config(
    directory: pathlib.Path, learn_steps: int, set_steps: int
) -> config_lib.TrainConfig:
    sizes = {"seq_len": _LENGTH, "rows": _ROWS}
    step = _ROWS * _LENGTH
    names = ("learn", "set")
    return config_lib.TrainConfig(
        model=MODEL,
        tokenizer=str(directory / "tokenizer"),
        dtype="float32",
        stages=(
            config_lib.TrainStage(
                **sizes, tokens=learn_steps * step, learning_rate=3e-3, warmup_tokens=20 * step
            ),
            config_lib.TrainStage(**sizes, tokens=set_steps * step, learning_rate=5e-4),
        ),
        data=config_lib.DataConfig(
            sources=tuple(
                config_lib.DataSource(name, str(directory / f"{name}.jsonl"), "chat")
                for name in names
            ),
            weights=((0, (("learn", 1.0),)), (learn_steps, (("set", 1.0),))),
        ),
        save=config_lib.SaveConfig(every_steps=learn_steps + set_steps),
        log=config_lib.LogConfig(every_steps=50),
    )

"""Samples from the generation engine: slices, versions, tools and seeds, with a small model."""

import dataclasses
import threading
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_support

from infer import config as engine_config
from infer import output_tokens
from m1_jax import ModelConfig
from m1_jax import params as params_lib
from train import lora
from train.rl import rollout, sample_columns, weight_sync
from train.rl import sample as sample_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

CONFIG = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    hidden_size=32,
    intermediate_size=32,
    initializer_range=0.2,
)
SIZES = rollout.make_engine_config(
    {"max_rows": 4, "chunk_tokens": 16, "prefill_tokens": (32,), "num_snapshots": 3,
     "decode_steps": 4, "record_routes": True}, 96, 16,
)  # fmt: skip
PROMPT = tuple(range(7, 30))
LENGTH = 21
TASK = sample_lib.Task("t", (), "s")


@pytest.fixture(scope="module")
def models():
    """Two models of one shape."""
    return [params_lib.random_model(CONFIG, jax.random.key(n), jnp.float32) for n in range(2)]


@pytest.fixture(scope="module")
def sampler(models, tokenizer):
    made = rollout.RolloutSampler(models[0], tokenizer, SIZES, rollout.RolloutSampling())
    yield made
    made.close()


def single(prompt=PROMPT, length=LENGTH):
    sample = sample_lib.Sample(TASK, prompt)
    sample.append_generated((yield sample_lib.Generate(prompt, length)))
    return sample


def run(sampler, *jobs, **options):
    """Return what became of the jobs, by key, and the times."""
    found = {}

    def take(key, result):
        assert key not in found
        found[key] = result
        return ()

    times = sampler.run(lambda: iter(jobs), take, **options)
    return found, times


def job(key, episode=None, seed=None, **more):
    return rollout.EpisodeJob(key, episode or single(), key if seed is None else seed, **more)


def said(one):
    """Return what training sees of an answer, but for the versions."""
    return one.tokens.tolist(), one.logprobs.tolist(), one.status, one.routes.tolist()


@pytest.fixture(scope="module")
def plain(sampler):
    """Answers to seeds 0 to 3 that run side by side, unsliced."""
    found, times = run(sampler, *(job(seed) for seed in range(4)))
    assert times.num_tokens == sum(len(one.tokens) for one in found.values())
    assert 0 <= times.waiting_secs <= times.total_secs
    return found


def test_a_sample_depends_on_its_seed_alone(sampler, plain):
    assert len({tuple(one.tokens) for one in plain.values()}) == 4
    for one in plain.values():
        assert one.mask.tolist() == [1] * LENGTH
        assert one.status == "length"
        assert all(logp < 0 for logp in one.logprobs)
        assert one.routes.shape == (len(PROMPT) + LENGTH - 1, 2, 2)
    alone, _ = run(sampler, job("alone", seed=2))
    assert said(alone["alone"]) == said(plain[2])
    crowd = [job(i, single(PROMPT[i:], 5), 99 + i) for i in range(5)]
    found, _ = run(sampler, *crowd, job("last", seed=1))
    assert said(found["last"]) == said(plain[1])


@pytest.mark.parametrize("slice_tokens", [1, 4, 10, LENGTH])
def test_slices_make_the_answer_of_one_piece(sampler, plain, slice_tokens):
    made, tokens, calls = dict.fromkeys(range(4)), 0, 0
    finished = {}
    while made:
        jobs = [job(n, partial=one, slice_tokens=slice_tokens) for n, one in made.items()]
        found, times = run(sampler, *jobs)
        tokens += times.num_tokens
        calls += 1
        for key, result in found.items():
            del made[key]
            if isinstance(result, rollout.PausedEpisode):
                # As a checkpoint keeps it.
                columns = sample_columns.partials_to_columns([result.partial], "partial")
                (made[key],) = sample_columns.partials_from_columns(columns, "partial")
                for name in ("tokens", "logprobs", "raw", "versions", "routes"):
                    before, after = getattr(result.partial, name), getattr(made[key], name)
                    np.testing.assert_array_equal(before, after)
                assert len(result.partial.routes) == len(PROMPT) + calls * slice_tokens - 1
                assert len(result.partial.tokens) == calls * slice_tokens
            else:
                finished[key] = result
    assert {key: said(one) for key, one in finished.items()} == {
        key: said(one) for key, one in plain.items()
    }
    assert calls == -(-LENGTH // slice_tokens)
    assert tokens == 4 * LENGTH  # each is counted once


def test_greedy_samples_do_not_depend_on_seeds(sampler, plain):
    jobs = [job("a", seed=1), job("b", seed=2)]
    found, _ = run(sampler, *jobs, sampling=rollout.RolloutSampling(temperature=0.0))
    assert found["a"].tokens.tolist() == found["b"].tokens.tolist()
    assert found["a"].tokens.tolist() not in [one.tokens.tolist() for one in plain.values()]
    again, _ = run(sampler, job(3))  # the run's own sampling is back
    assert said(again[3]) == said(plain[3])


def test_turns_with_tools_in_between(sampler):
    where, told = [], (40, 41, 42)

    def tool():
        where.append(threading.current_thread().name)
        return told

    def talk():
        sample = sample_lib.Sample(TASK, PROMPT)
        for _ in range(3):
            sample.append_generated((yield sample_lib.Generate((*PROMPT, *sample.tokens), 4)))
            sample.append_observation((yield sample_lib.RunTool(tool)))
        return sample

    found, times = run(sampler, *(job(n, talk(), 5) for n in range(2)))
    one, other = found[0], found[1]
    assert said(one) == said(other)
    assert one.mask.tolist() == ([1] * 4 + [0] * 3) * 3
    assert one.tokens[4:7].tolist() == list(told)
    assert one.versions.tolist() == ([sampler.version] * 4 + [-1] * 3) * 3
    # Of all that the last turn had before it, and of its own tokens but the last.
    assert len(one.routes) == len(PROMPT) + len(one.tokens) - len(told) - 1
    assert times.num_tokens == 2 * 12
    assert len(where) == 6
    assert all(name.startswith("tool") for name in where)
    # Every turn draws with a seed of its own: equal turns are not alike.
    turn = sample_lib.Generate(PROMPT, 8)

    def repeat():
        first = yield turn
        second = yield turn
        return first.tokens.tolist(), second.tokens.tolist()

    first, second = run(sampler, job(0, repeat()))[0][0]
    assert first != second


def test_tools_work_side_by_side_and_are_waited_for(sampler):
    both = threading.Barrier(2)

    def act():
        return (yield sample_lib.RunTool(lambda: both.wait(timeout=60)))

    found, times = run(sampler, job(0, act()), job(1, act()))
    assert sorted(found.values()) == [0, 1]
    assert times.num_tokens == 0


def test_a_tools_exception_reaches_its_episode(sampler, plain):
    class Broken(Exception):
        pass

    def fail():
        raise Broken("no such file")

    def act():
        try:
            yield sample_lib.RunTool(fail)
        except Broken as error:
            return str(error)

    found, _ = run(sampler, job("broken", act()), job("fine", seed=0))
    assert found["broken"] == "no such file"
    assert said(found["fine"]) == said(plain[0])


def test_more_jobs_follow_those_that_end(sampler, plain):
    done = []

    def take(key, result):
        done.append((key, result.tokens.tolist()))
        return [job(key + 1)] if key < 3 else []

    times = sampler.run(lambda: [job(0)], take)
    assert done == [(seed, one.tokens.tolist()) for seed, one in plain.items()]
    assert times.num_tokens == 4 * LENGTH
    assert sampler.run(list, take).num_tokens == 0  # nothing to do


def test_equal_keys_are_refused(sampler, plain):
    with pytest.raises(ValueError, match="episode 1: got it twice"):
        run(sampler, job(1), job(1))


def test_new_weights_begin_with_the_next_run(sampler, models, plain):
    before = sampler.version
    paused = run(sampler, job(0, slice_tokens=5))[0][0]
    assert paused.partial.versions.tolist() == [before] * 5
    recorded = len(PROMPT) + 5 - 1
    np.testing.assert_array_equal(paused.partial.routes, plain[0].routes[:recorded])
    sampler.update_weights(models[1], before + 1)
    assert sampler.version == before + 1  # told before the next run has taken them
    found, _ = run(sampler, job(0, partial=paused.partial), job(1))
    assert found[0].versions.tolist() == [before] * 5 + [before + 1] * (LENGTH - 5)
    for name in ("tokens", "logprobs"):
        column, expected = getattr(found[0], name), getattr(plain[0], name)
        np.testing.assert_array_equal(column[:5], expected[:5])
        assert (column[5:] != expected[5:]).any()
    assert found[1].versions.tolist() == [before + 1] * LENGTH
    # Routes are those that came first, although the prefix was computed anew.
    assert len(found[0].routes) == len(PROMPT) + LENGTH - 1
    np.testing.assert_array_equal(found[0].routes[:recorded], plain[0].routes[:recorded])
    assert (found[0].routes[recorded:] != plain[0].routes[recorded:]).any()
    assert (found[1].routes[: len(PROMPT)] != plain[0].routes[: len(PROMPT)]).any()
    sampler.update_weights(models[0], before + 2)
    again, _ = run(sampler, job(1))
    assert said(again[1]) == said(plain[1])
    assert again[1].versions.tolist() == [before + 2] * LENGTH
    sampler.continue_from(before + 7)
    assert sampler.version == before + 7


def test_a_run_can_be_stopped_and_leaves_nothing_under_way(sampler, plain):
    asked = []

    def stopping():
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(rollout.RolloutStopped):
        run(sampler, *(job(n) for n in range(6)), should_stop=stopping)
    sampler.dismiss()  # refuses while requests are under way
    found, times = run(sampler, job(2))
    assert said(found[2]) == said(plain[2])
    assert times.num_tokens == LENGTH


def test_the_sampler_applies_adapters(models, tokenizer):
    """Probabilities are those of the trainer with its adapters, and differ from those without."""
    plain = jax.tree.map(lambda leaf: leaf, models[0])
    adapted = lora.add_adapters(plain, lora.LoraConfig(2, 4.0), jax.random.key(0))
    sync = weight_sync.WeightSync(CONFIG, jnp.dtype(jnp.float32))
    made = rollout.RolloutSampler(sync(adapted), tokenizer, SIZES, rollout.RolloutSampling())
    before = run(made, job(0), job(1))[0]
    for name, param in params_lib.params_by_path(adapted).items():
        if name.endswith("adapter.b"):
            param.set_value(1e-3 * jax.random.normal(jax.random.key(1), param.shape))
    made.update_weights(sync(adapted), 1)
    after = run(made, job(0), job(1), job(2))[0]
    assert sync.metrics["handover_share"] == pytest.approx(1, abs=1e-6)
    sample = after[0]
    tokens = jnp.asarray([*PROMPT, *sample.tokens])[None]
    logp = jax.nn.log_softmax(adapted(tokens)[0, len(PROMPT) - 1 : -1].astype(jnp.float32))
    wanted = np.take_along_axis(np.asarray(logp), sample.tokens[:, None], 1)[:, 0]
    np.testing.assert_allclose(sample.logprobs, wanted, atol=1e-5)
    assert np.abs(sample.logprobs[0] - before[0].logprobs[0]) > 1e-4
    assert said(run(made, job(0))[0][0]) == said(sample)  # also alone
    made.close()


class Ending:
    """An engine whose requests end at once, for a reason of their own."""

    reasons = ("stop", "length", "loop", "error", "cancelled")
    version = 4

    def __init__(self, *_):
        self.submitted = []

    def submit(self, tokens, options, prior_tokens=None):
        reason = self.reasons[len(self.submitted)]
        self.submitted.append(options)
        number = options.max_tokens if reason == "length" else 1
        columns = [3] * number, [-1.0] * number, [-1.5] * number, [self.version] * number
        made = output_tokens.OutputTokens.from_columns(*columns)
        return types.SimpleNamespace(tokens=made, finish_reason=reason, routes=None, text="")

    def step(self):
        return False

    def close(self):
        pass


def test_why_answers_end(monkeypatch):
    monkeypatch.setattr(rollout.engine, "Engine", Ending)
    sampling = rollout.RolloutSampling(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop_on_loop=False
    )
    made = rollout.RolloutSampler(None, None, SIZES, sampling)
    found, times = run(made, *(job(n) for n in range(5)))
    statuses = [found[n].status for n in range(5)]
    assert statuses == ["stop", "length", "repetition", "error", "error"]
    assert set(statuses) == set(typing.get_args(sample_lib.SampleStatus))
    assert times.num_tokens == 4 + LENGTH
    for n, options in enumerate(made._engine.submitted):
        for field in dataclasses.fields(sampling):
            assert getattr(options, field.name) == getattr(sampling, field.name)
        assert (options.seed, options.max_tokens) == (n, LENGTH)
    made.close()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0}]
)
def test_sampling_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}: got .*; wanted"):
        rollout.RolloutSampling(**wrong)


def test_sizes_of_the_engine():
    assert isinstance(SIZES, engine_config.EngineConfig)
    assert (SIZES.max_length, SIZES.max_queue, SIZES.record_routes) == (96, 16, True)
    for name in ("rows", "max_length", "max_queue"):
        with pytest.raises(ValueError, match=rf"rollout\.engine: got '{name}'; wanted some of"):
            rollout.make_engine_config({name: 8}, 96, 16)
    with pytest.raises(ValueError, match="max_rows"):
        rollout.make_engine_config({"max_rows": 0}, 96, 16)

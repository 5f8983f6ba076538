import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax.task import episode_key

KEY = jax.random.key(0)
TASKS = ax.tasks.sinusoid(shot=5, query=5)
LEARNER = ax.MAML(ax.losses.mse, 0.01)


def model():
    return ax.models.MLP(1, 1, (8,), key=KEY)


def fit(learner=LEARNER, tasks=TASKS.train, **how):
    how = {"steps": 12, "meta_batch": 4, "chunk": 3, "key": KEY, "devices": 1, **how}
    return ax.fit(learner, model(), tasks, **how)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(ax.tree.parameters(tree))]


def assert_same(a, b):
    assert all(x.tobytes() == y.tobytes() for x, y in zip(arrays(a), arrays(b), strict=True))


def assert_close(a, b, rtol=1e-4):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert np.allclose(x, y, rtol=rtol, atol=1e-6)


def strict_json(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def whole():
    """What the runs below are compared with."""
    return fit()


def test_one_program_whatever_the_model_starts_from():
    """Of a weak type, as Python numbers make it, too: the program's results are of none."""
    seen, traced = [], []

    def loss(model, batch):
        traced.append(1)
        return jnp.mean((model(batch.x) - batch.y) ** 2)

    start = ax.models.MLP(1, 1, (8,), key=KEY)
    weak = eqx.tree_at(lambda net: net.layers[0].bias, start, jnp.full(8, 0.5))
    assert jax.tree.leaves(weak.layers[0].bias)[0].weak_type
    ax.fit(ax.MAML(loss, 0.01), weak, TASKS.train, steps=6, chunk=3, meta_batch=2, key=KEY,
           devices=1, watch=lambda record: seen.append(len(traced)))  # fmt: skip
    assert seen[0] == seen[1]


def test_the_loss_falls():
    seen = []
    result = fit(steps=300, chunk=100, meta_batch=8, optimizer=optax.adam(1e-2), watch=seen.append)
    assert result.history == seen
    assert [record["step"] for record in seen] == [100, 200, 300]
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    assert (result.stopped, result.step, result.best_step) == ("done", 300, 300)
    assert result.best_score is None
    assert all(record["seconds"] > 0 and record["gradient_norm"] > 0 for record in seen)


def test_the_given_model_is_left_alone(whole):
    start = model()
    ax.fit(LEARNER, start, TASKS.train, steps=2, key=KEY, meta_batch=2)
    assert_same(start, model())
    assert not np.array_equal(arrays(start)[0], arrays(whole.meta)[0])


def test_chunks_and_mappings_do_not_matter(whole):
    for how in ({"chunk": 12}, {"mapping": "scan"}, {"mapping": 3}, {"devices": 2}, {"devices": 4}):
        assert_close(fit(**how).meta, whole.meta)


def test_the_key_decides_everything(whole):
    assert_same(fit().meta, whole.meta)
    assert not np.array_equal(arrays(fit(key=jax.random.key(1)).meta)[0], arrays(whole.meta)[0])


def test_any_optimizer():
    clipped = optax.chain(optax.clip(0.1), optax.sgd(0.5))
    result = fit(optimizer=clipped, steps=1, chunk=1)
    moved = [np.abs(a - b).max() for a, b in zip(arrays(result.meta), arrays(model()))]
    assert 0 < max(moved) <= 0.05 + 1e-6


# Divergence


class Poisoned(ax.TaskDistribution):
    """Sine waves, but one episode has targets that are NaN."""

    bad: jax.Array
    split: str = eqx.field(static=True)

    def sample(self, key):
        task = TASKS.train.sample(key)
        poison = jnp.where(jnp.all(jax.random.key_data(key) == self.bad), jnp.nan, 0.0)
        return eqx.tree_at(lambda t: t.query.y, task, task.query.y + poison)


def poisoned(step, meta_batch=4):
    stream = jax.random.split(KEY, 4)[0]
    bad = episode_key("train", stream, step * meta_batch + 1)
    return Poisoned(bad=jax.random.key_data(bad), split="train")


@pytest.mark.parametrize("step", [0, 4])
def test_a_step_that_is_not_finite_ends_training(step, tmp_path):
    with pytest.raises(ax.TrainingDiverged, match=f"not finite at meta-step {step + 1};") as caught:
        fit(tasks=poisoned(step), run=str(tmp_path / "run"))
    result = caught.value.result
    assert (result.step, result.stopped) == (step, "diverged")
    good = model() if step == 0 else fit(steps=step).last
    assert_close(result.meta, good, rtol=1e-5)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [strict_json(line) for line in lines]
    assert records[-1]["step"] == step
    assert records[-1]["loss"] is None if step == 0 else records[-1]["loss"] > 0
    kept = ax.Run(tmp_path / "run").checkpoint_file
    header = kept.read_bytes()
    assert np.asarray(arrays(result.last)[0]).tobytes() in header  # the last good state


# Validation


def test_the_best_by_validation_is_kept():
    there_and_back = optax.sgd(lambda step: jnp.where(step < 6, 0.01, -0.05))
    result = fit(
        optimizer=there_and_back, validate=TASKS.val, validate_every=3, validation={"episodes": 50}
    )
    scores = [record["validation"]["mse"] for record in result.history]
    assert result.best_step == 6 == 3 * (1 + int(np.argmin(scores)))
    assert np.isclose(result.best_score, -min(scores))
    assert_close(result.meta, fit(optimizer=there_and_back, steps=6).last)
    assert not np.array_equal(arrays(result.meta)[0], arrays(result.last)[0])


def test_training_stops_early():
    result = fit(
        optimizer=optax.sgd(0.0), validate=TASKS.val, validate_every=3, patience=2,
        validation={"episodes": 4},
    )  # fmt: skip
    assert (result.stopped, result.step, result.best_step) == ("early", 9, 3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"validate": TASKS.test}, "given the test split"),
        ({"steps": 0}, "steps is a whole number of at least 1, not 0"),
        ({"meta_batch": -2}, "meta_batch is a whole number of at least 1, not -2"),
        ({"validate_every": 0}, "validate_every is .*, not 0"),
        ({"patience": -1}, "patience is .*, not -1"),
        ({"steps": 2**31}, "2,147,483,648 steps of 4 tasks are more than are numbered"),
        ({"validate": TASKS.val, "validation": {"episodes": -5}}, "episodes is at least 1, not -5"),
        ({"resume": True}, "wants run="),
        ({"devices": 3}, "devices=3 should be at most the 4 local devices"),
        ({"devices": 8, "meta_batch": 8}, "devices=8 should be"),
    ],
)
def test_arguments_that_make_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        fit(**how)


# Resuming


@contextlib.contextmanager
def stop_after(step):
    """Gives a `watch` that raises an error once."""

    class Stop(Exception):
        pass

    def watch(record):
        if record["step"] == step:
            raise Stop

    with pytest.raises(Stop):
        yield watch


@pytest.mark.parametrize("validate", [None, TASKS.val])
def test_a_resumed_run_equals_an_uninterrupted_one(validate, tmp_path):
    how = {"validate": validate, "validate_every": 3, "validation": {"episodes": 4}}
    expected = fit(**how)
    with stop_after(6) as watch:
        fit(run=str(tmp_path), watch=watch, **how)
    result = fit(run=str(tmp_path), resume=True, **how)
    assert_same(result.meta, expected.meta)
    assert_same(result.last, expected.last)
    assert (result.best_step, result.best_score) == (expected.best_step, expected.best_score)
    assert [r["step"] for r in result.history] == [3, 6, 9, 12]
    assert [r["loss"] for r in result.history] == [r["loss"] for r in expected.history]
    again = fit(run=str(tmp_path), resume=True, **how)  # nothing is left to do
    assert_same(again.meta, expected.meta)


def test_ctrl_c_ends_after_the_chunk_and_can_be_resumed(tmp_path, whole):
    handler = signal.getsignal(signal.SIGINT)

    def press(record):
        if record["step"] == 6:
            signal.raise_signal(signal.SIGINT)

    result = fit(run=str(tmp_path), watch=press)
    assert (result.stopped, result.step) == ("interrupted", 6)
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(fit(run=str(tmp_path), resume=True).meta, whole.meta)


def test_what_cannot_be_resumed(tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        fit(run=folder, resume=True)
    fit(run=folder)
    with pytest.raises(ValueError, match="already holds a run; resume it, or choose another"):
        fit(run=folder)


SCRIPT = """
import sys, time, jax, adaptax as ax
folder, resume, pause, out = sys.argv[1], sys.argv[2] == "resume", float(sys.argv[3]), sys.argv[4]
def watch(record):
    print(record["step"], flush=True)
    time.sleep(pause)
result = ax.fit(
    ax.MAML(ax.losses.mse, 0.01), ax.models.MLP(1, 1, (8,), key=jax.random.key(0)),
    ax.tasks.sinusoid(shot=5, query=5).train, steps=60, meta_batch=4, chunk=3,
    key=jax.random.key(0), run=folder, resume=resume, watch=watch,
)
ax.save(out, result.meta)
"""


def test_kill_9_and_resume(tmp_path):
    def start(folder, how, pause, out):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / folder), how, str(pause)]
        return subprocess.Popen(
            [*command, str(tmp_path / out)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
        )

    with start("whole", "new", 0, "whole.out") as whole, start("cut", "new", 0.2, "") as cut:
        for line in cut.stdout:
            if int(line) >= 21:
                break
        cut.kill()
        assert cut.wait() == -signal.SIGKILL
        assert whole.wait() == 0
    assert not Path(tmp_path / "cut.out").exists()
    with start("cut", "resume", 0, "cut.out") as rest:
        steps = [int(line) for line in rest.stdout]
    assert rest.returncode == 0
    assert 21 <= steps[0] <= 27
    assert steps[-1] == 60
    assert (tmp_path / "cut.out").read_bytes() == (tmp_path / "whole.out").read_bytes()
    records = [
        json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == list(range(3, 61, 3))


# Data on the host

BANK = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)


def rows(key):
    return jax.random.choice(key, 50, (10,), replace=False)


def gathered(x):
    y = jnp.sin(x)
    return ax.Task(ax.Batch(x[..., :5, :], y[..., :5, :]), ax.Batch(x[..., 5:, :], y[..., 5:, :]))


class OnDevice(ax.TaskDistribution):
    bank: jax.Array
    split: str = eqx.field(static=True)

    def sample(self, key):
        return gathered(self.bank[rows(key)])


class OnHost(ax.HostTaskDistribution):
    split: str = eqx.field(static=True, default="train")

    def plan(self, key):
        return rows(key)

    def fetch(self, plan):
        return gathered(jnp.asarray(BANK[np.asarray(plan)]))


def test_streamed_tasks_train_to_the_same_bits():
    streamed, resident = (
        fit(tasks=OnHost()),
        fit(tasks=OnDevice(bank=jnp.asarray(BANK), split="train")),
    )
    assert_same(streamed.meta, resident.meta)


def test_an_error_of_a_streamed_fetch_reaches_the_caller():
    class Broken(OnHost):
        def fetch(self, plan):
            if plan.ndim == 3:  # a chunk of steps, and not the first look
                raise OSError("the disk is gone")
            return super().fetch(plan)

    with pytest.raises(OSError, match="the disk is gone"):
        fit(tasks=Broken())

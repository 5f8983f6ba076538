"""A run resumed with one argument changed: refused by its name, or allowed as the docs say."""

import functools
import shutil
import signal
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptax as ax
from adaptax.tasks.episodes import Design, HostRows, StreamedEpisodes

KEY = jax.random.key(0)
SINES = ax.tasks.sinusoid(shot=5, query=5)
BANK = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
SCALE = 1.0


def scaled(model, batch, power=2):
    return SCALE * jnp.mean(jnp.abs(model(batch.x) - batch.y) ** power)


def weighted(weight):
    def loss(model, batch):
        return weight * jnp.mean((model(batch.x) - batch.y) ** 2)

    return loss


def coded(text):
    names = {"jnp": jnp}
    exec(f"def loss(model, batch):\n    return {text}", names)
    return names["loss"]


class Net(eqx.Module):
    mlp: ax.models.MLP
    mask: jax.Array
    scale: float = 1.0

    def __call__(self, x):
        return self.scale * self.mlp(x) * self.mask


def net(seed=0, width=8, activation=jax.nn.relu, mask=1, scale=1.0, out=1):
    mlp = ax.models.MLP(1, out, (width,), key=jax.random.key(seed), activation=activation)
    return Net(mlp, jnp.array(mask), scale)


class Own(ax.MetaLearner):
    loss: ax.Loss = eqx.field(static=True)

    def adapt(self, meta, support, *, key):
        return meta

    def meta_loss(self, meta, task, *, key, progress):
        return self.loss(meta, task.query.draw(meta, key)), {}


class Other(ax.MetaLearner):
    loss: ax.Loss = eqx.field(static=True)

    def adapt(self, meta, support, *, key):
        return meta

    def meta_loss(self, meta, task, *, key, progress):
        return self.loss(meta, task.query.draw(meta, key)) * 2, {}


Other.__name__ = Other.__qualname__ = "Own"  # the same class, edited


class Shifted(ax.TaskDistribution):
    split: str = eqx.field(static=True, default="train")
    table: dict = eqx.field(default_factory=dict)

    def sample(self, key):
        x = jax.random.normal(key, (4, 1))
        half = ax.Batch(x[:2], x[:2] + self.table["shift"])
        return ax.Task(half, ax.Batch(x[2:], x[2:] + self.table["shift"]))


class Rule(eqx.Module):
    """An outer step of its own."""

    rate: float = 0.1

    def init(self, trained):
        return ()

    def step(self, learner, meta, state, tasks, *, key, progress, mesh=None):
        loss = lambda meta: jnp.mean(meta.mlp.head.bias**2)
        grads = jax.grad(lambda bias: jnp.mean((bias - 1) ** 2))(meta.mlp.head.bias)
        new = eqx.tree_at(lambda m: m.mlp.head.bias, meta, meta.mlp.head.bias - self.rate * grads)
        return new, state, loss(meta), {}


def bank(change=None, streamed=False, **how):
    array = BANK.copy()
    if change is not None:
        array[change] += 1e-6
    design = Design(way=2, shot=1, query=2, **how)
    rest = {"start": jnp.arange(0, 40, 10), "count": jnp.full(4, 10), "design": design,
            "split": "train", "name": "bank", "classes": ("a", "b", "c", "d")}  # fmt: skip
    if streamed:
        return StreamedEpisodes(bank=HostRows(array, np.arange(40)), **rest)
    return ax.tasks.episodes.Episodes(bank=jnp.asarray(array), **rest)


def renamed(names):
    """The same rows under other classes: one is deleted, and another added."""
    tasks = bank()
    object.__setattr__(tasks, "classes", names)
    return tasks


MAML = functools.partial(ax.MAML, inner_lr=0.01)
HEAD = {"model": ax.models.MLP(3, 2, (4,), key=KEY), "learner": MAML(ax.losses.cross_entropy)}
ADAM = optax.adam(1e-3)


def cosine(steps):
    return optax.adam(optax.cosine_decay_schedule(1e-3, steps))


def decayed(mask):
    return optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > mask, p))


def global_changed(monkeypatch):
    monkeypatch.setattr(f"{__name__}.SCALE", 2.0)


def precision_changed(monkeypatch):
    monkeypatch.setattr(
        "adaptax.engine.train.settings", lambda: {"jax_default_matmul_precision": "high"}
    )


REFUSED = {
    # name: (arguments of the run, those changed, what the error says)
    "inner_lr": ({}, {"learner": MAML(ax.losses.mse, inner_lr=0.02)},
                 "learner.inner_lr was 0.01 and is 0.02"),
    "inner_steps": ({}, {"learner": MAML(ax.losses.mse, inner_steps=2)},
                    "learner.inner_steps was 1 and is 2"),
    "order": ({}, {"learner": MAML(ax.losses.mse, first_order=True)},
              "learner.first_order was False and is True"),
    "inner rule": ({"learner": MAML(ax.losses.mse, inner_optimizer=ax.inner.adam(0.1))},
                   {"learner": MAML(ax.losses.mse, inner_optimizer=ax.inner.adam(0.2))},
                   r"learner.inner_optimizer\S* was -?0.1 and is -?0.2"),
    "predicate": ({"learner": MAML(ax.losses.mse, adapt_only=ax.tree.under("mlp/head"))},
                  {"learner": MAML(ax.losses.mse, adapt_only=ax.tree.under("mlp/layers"))},
                  r"adapt_only.prefixes was tuple.'mlp/head'. and is tuple.'mlp/lay"),
    "algorithm": ({}, {"learner": ax.Reptile(ax.losses.mse, 0.01)},
                  "learner was adaptax.algorithms.maml.MAML and is adaptax.algorithms.reptile.Rep"),
    "own learner's code": ({"learner": Own(ax.losses.mse)}, {"learner": Other(ax.losses.mse)},
                           "learner.code was #.* and is #"),
    "loss": ({}, {"learner": MAML(ax.losses.mae if hasattr(ax.losses, "mae") else scaled)},
             "learner.loss was adaptax.losses.mse and is"),
    "loss closure": ({"learner": MAML(weighted(1.0))}, {"learner": MAML(weighted(2.0))},
                     "learner.loss.weight was 1.0 and is 2.0"),
    "loss partial": ({"learner": MAML(functools.partial(scaled, power=2))},
                     {"learner": MAML(functools.partial(scaled, power=3))},
                     "learner.loss.power was 2 and is 3"),
    "loss code": ({"learner": MAML(coded("jnp.mean((model(batch.x) - batch.y) ** 2)"))},
                  {"learner": MAML(coded("jnp.sum((model(batch.x) - batch.y) ** 2)"))},
                  "learner.loss.code was #.* and is #"),
    "loss global": ({"learner": MAML(scaled)}, {"change": global_changed},
                    "learner.loss.SCALE was 1.0 and is 2.0"),
    "outer rate": ({"optimizer": ADAM}, {"optimizer": optax.adam(2e-3)},
                   r"outer\S* was -0.001 and is -0.002"),
    "outer rule": ({}, {"optimizer": ADAM}, "outer was .the learner.* own. and is optax"),
    "schedule": ({"optimizer": cosine(12)}, {"optimizer": cosine(13)},
                 "decay_steps was 12 and is 13"),
    "mask": ({"optimizer": decayed(0)}, {"optimizer": decayed(1)}, r"outer\S*mask was 0 and is 1"),
    "outer step": ({"outer": Rule()}, {"outer": Rule(0.2)}, "outer.rate was 0.1 and is 0.2"),
    "shots": ({}, {"tasks": ax.tasks.sinusoid(shot=6, query=5).train},
              "tasks.shot was 5 and is 6"),
    "queries": ({}, {"tasks": ax.tasks.sinusoid(shot=5, query=6).train},
                "tasks.query was 5 and is 6"),
    "split": ({}, {"tasks": SINES.val}, "tasks.split was 'train' and is 'val'"),
    "family": ({}, {"tasks": Shifted(table={"shift": 0.5})}, "tasks was .*Sinusoid and is Shifted"),
    "own tasks": ({"tasks": Shifted(table={"shift": 0.5})},
                  {"tasks": Shifted(table={"shift": 0.6})},
                  r"tasks.table\['shift'\] was 0.5 and is 0.6"),
    "data": (HEAD | {"tasks": bank()}, {"tasks": bank(change=(17, 2))},
             r"tasks.bank was float32\[40,3\] #.* and is float32\[40,3\] #"),
    "data on the host": (HEAD | {"tasks": bank(streamed=True)},
                         {"tasks": bank(change=(17, 2), streamed=True)},
                         r"tasks.bank.array was float32\[40,3\] #.* and is float32\[40,3\] #"),
    "classes": (HEAD | {"tasks": bank()}, {"tasks": renamed(("a", "b", "c", "e"))},
                r"tasks.classes was tuple\('a', 'b', 'c', 'd'\) and is tuple\('a', 'b', 'c', 'e"),
    "width": ({}, {"model": net(width=9)}, r"model.mlp.layers\[0\].\S+ was float32\[1,8\] and is"),
    "activation": ({}, {"model": net(activation=jnp.tanh)}, "model.mlp.activation was .* and is"),
    "what is not trained": ({}, {"model": net(mask=0)}, r"model.mask was int32.* 1 and is"),
    "static part": ({}, {"model": net(scale=2.0)}, "model.scale was 1.0 and is 2.0"),
    "mapping": ({}, {"mapping": "scan"}, "mapping was auto and is scan"),
    "devices": ({}, {"devices": 2}, "devices was 1 and is 2"),
    "chunk": ({}, {"chunk": 4}, "chunk was 3 and is 4"),
    "meta_batch": ({}, {"meta_batch": 8}, "meta_batch was 4 and is 8"),
    "key": ({}, {"key": jax.random.key(1)}, r"key was key<fry>\S+ \[0, 0\] and is"),
    "keep": ({}, {"keep": 2}, "keep was 1 and is 2"),
    "fast_path": ({}, {"fast_path": False}, "fast_path was auto and is False"),
    "fewer steps": ({}, {"steps": 9}, "steps was 12 and is 9"),
    "precision": ({}, {"change": precision_changed}, "default_matmul_precision was None and is"),
}  # fmt: skip


USUAL = MAML(ax.losses.mse)


def fit(learner=USUAL, model=None, tasks=SINES.train, **how):
    how = {"steps": 12, "meta_batch": 4, "chunk": 3, "key": KEY, "devices": 1, **how}
    return ax.fit(learner, net() if model is None else model, tasks, **how)


def press(record):
    if record["step"] == 6:
        signal.raise_signal(signal.SIGINT)


def begun(folder, **how):
    """A run interrupted half-way."""
    assert fit(run=folder, watch=press, **how).stopped == "interrupted"
    return folder


def arrays(result):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(ax.tree.parameters(result))]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The run of the default arguments, half-way, and its end without a break."""
    how = {"validate": SINES.val, "validation": {"episodes": 4}, "validate_every": 3}
    folder = begun(tmp_path_factory.mktemp("half"), **how)
    return folder, how, fit(**how)


@pytest.fixture
def again(half, tmp_path):
    """Resume a copy of it with other arguments."""
    folder, how, _ = half
    copy = shutil.copytree(folder, tmp_path / "copy")
    return lambda **changes: fit(run=copy, resume=True, **{**how, **changes})


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind, again, tmp_path, monkeypatch):
    base, changes, said = REFUSED[kind]
    if base:
        base = {"steps": 3, "run": tmp_path / "own", **base}
        fit(**base)
        again = functools.partial(fit, **{"resume": True, **base})
    changes = dict(changes)
    changes.pop("change", lambda patch: None)(monkeypatch)
    with pytest.raises(ValueError, match=f"cannot be resumed with other settings: .*{said}"):
        again(**changes)


def test_the_same_made_anew_is_the_same(tmp_path):
    """Functions, closures and rules are compared by what they do, and not by where they lie."""
    make = lambda: {
        "learner": ax.MAML(weighted(0.5), 0.01, inner_optimizer=ax.inner.adam(0.1)),
        "optimizer": optax.chain(optax.clip(0.1), cosine(12), optax.masked(
            optax.sgd(1.0), lambda p: jax.tree.map(lambda leaf: True, p))),
        "tasks": Shifted(table={"shift": 0.5}),
    }  # fmt: skip
    begun(tmp_path, **make())
    assert arrays(fit(run=tmp_path, resume=True, **make()).meta) == arrays(fit(**make()).meta)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": net(seed=5)},  # the checkpoint has the weights
        {"patience": 50},
        {"watch": lambda record: None},
        {"devices": None},  # as many as it began with
        {"chunk": None},
    ],
    ids=["initial weights", "patience", "watch", "devices by default", "chunk by default"],
)
def test_what_may_change_and_changes_nothing(changes, again, half):
    result, whole = again(**changes), half[2]
    assert arrays(result.last) == arrays(whole.last)
    assert arrays(result.meta) == arrays(whole.meta)
    assert (result.best_step, result.best_score) == (whole.best_step, whole.best_score)


def test_where_the_data_lie_may_change(tmp_path):
    """Another array, or file, of the same content."""
    how = HEAD | {"tasks": bank(streamed=True)}
    begun(tmp_path / "run", **how)
    np.save(tmp_path / "moved.npy", BANK)
    mapped = np.load(tmp_path / "moved.npy", mmap_mode="r")
    moved = eqx.tree_at(lambda t: t.start, bank(streamed=True), jnp.arange(0, 40, 10))
    object.__setattr__(moved, "bank", HostRows(mapped, np.arange(40)))
    result = fit(run=tmp_path / "run", resume=True, **{**how, "tasks": moved})
    assert arrays(result.last) == arrays(fit(**how).last)


def test_more_steps(again, half):
    """Nothing here depends on how far training is, so it equals the longer run."""
    assert arrays(again(steps=18).last) == arrays(fit(steps=18).last)


def test_more_validations(again, half):
    result = again(validate_every=6)
    assert arrays(result.last) == arrays(half[2].last)
    assert [r["step"] for r in result.history if "validation" in r] == [3, 6, 12]


@pytest.mark.parametrize("finished", [False, True])
def test_another_validation_selects_anew(finished, again, half):
    """Its scores cannot be compared with those before."""
    if finished:
        again()
    with pytest.warns(UserWarning, match=r"validation\['episodes'\] was 4 and is 6; the best so"):
        result = again(validation={"episodes": 6})
    assert arrays(result.last) == arrays(half[2].last)
    assert result.best_step in ([12] if finished else [9, 12])
    judge = ax.evaluate(
        MAML(ax.losses.mse), result.meta, SINES.val, episodes=6, key=jax.random.split(KEY, 4)[3]
    )
    assert np.isclose(result.best_score, judge.score)


def test_what_cannot_be_compared_is_said(tmp_path):
    how = {"tasks": Shifted(table={"shift": 0.5, "lock": threading.Lock()})}
    begun(tmp_path, **how)
    with pytest.warns(UserWarning, match=r"what is in tasks.table\['lock'\] cannot be compared"):
        fit(run=tmp_path, resume=True, **how)


def test_other_conditions_are_said(again, monkeypatch):
    monkeypatch.setattr("adaptax.engine.train.made_by", lambda: {"jax": "0.0.1"})
    with pytest.warns(
        UserWarning, match=r"goes on under other conditions: jax was .* and is 0.0.1"
    ):
        again()


def test_fewer_devices_than_it_began_with(tmp_path, monkeypatch):
    begun(tmp_path, devices=4)
    fit(run=tmp_path, resume=True, devices=None)
    monkeypatch.setattr(jax, "local_devices", lambda: [None, None])
    with pytest.raises(ValueError, match=r"devices=4 should be .*_device_count=4 makes a CPU so"):
        fit(run=tmp_path, resume=True, devices=None)

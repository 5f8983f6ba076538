"""Time and memory of a meta-gradient in each mode of the inner loop, as its steps grow.

One task, second-order MAML. Each configuration is compiled and run in a process of its own, and
those of one number of steps take turns. `temporary` is what XLA's plan needs beside arguments and
results; `peak` is the process's largest resident memory while it runs, its compiler's included.

    python benchmarks/meta_gradient.py mlp --json benchmarks/results/meta_gradient.json
"""

import argparse
import json
import time
from pathlib import Path

import measure

MODES = ("reverse", "checkpoint=1", "forward", "forward, checkpoint=8")
STEPS = (1, 8, 32, 128)
LARGEST = 6 * 2**30
"""Bytes of temporaries beyond which a program is planned and not run."""


def mlp(ax, jax):
    keys = jax.random.split(jax.random.key(0), 3)
    tasks = ax.tasks.sinusoid(shot=10, query=10).train
    model = ax.models.MLP(1, 1, (40, 40), key=keys[0])
    return model, ax.losses.mse, 0.01, tasks.sample(keys[1])


def images(side):
    """Omniglot's net with strides, or miniImageNet's with pooling; 1 shot, 15 queries a class."""

    def make(ax, jax):
        jnp = jax.numpy
        how = {} if side == 28 else ax.models.CONV4["maml mini_imagenet"]
        keys = jax.random.split(jax.random.key(0), 3)
        model = ax.models.Conv4(out=5, key=keys[0], **how)
        of = lambda key, n: ax.Batch(  # noqa: E731
            jax.random.normal(key, (5 * n, side, side, 1 if side == 28 else 3)),
            jnp.repeat(jnp.arange(5), n),
        )
        return model, ax.losses.cross_entropy, 0.01, ax.Task(of(keys[1], 1), of(keys[2], 15))

    return make


def lstm(ax, jax):
    """8 sequences of 64 steps, a cell of 128, a prediction at every step."""
    import equinox as eqx

    jnp = jax.numpy

    class Net(eqx.Module):
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __call__(self, x):
            def one(x):
                start = (jnp.zeros(128), jnp.zeros(128))
                step = lambda carry, x: (new := self.cell(x, carry), new[0])  # noqa: E731
                return jax.vmap(self.head)(jax.lax.scan(step, start, x)[1])

            return jax.vmap(one)(x)

    keys = jax.random.split(jax.random.key(0), 4)
    model = Net(eqx.nn.LSTMCell(16, 128, key=keys[0]), eqx.nn.Linear(128, 16, key=keys[1]))
    of = lambda key: (lambda x: ax.Batch(x[:, :-1], x[:, 1:]))(  # noqa: E731
        jnp.cumsum(jax.random.normal(key, (8, 65, 16)), 1) / 8
    )
    return model, ax.losses.mse, 0.01, ax.Task(of(keys[2]), of(keys[3]))


def transformer(ax, jax):
    """A causal language model of 1.0 million parameters on 256 tokens."""
    import equinox as eqx

    jnp = jax.numpy
    width, heads, length, words = 128, 4, 256, 128

    class Block(eqx.Module):
        norms: list
        qkv: eqx.nn.Linear
        out: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
            self.qkv = eqx.nn.Linear(width, 3 * width, key=keys[0])
            self.out = eqx.nn.Linear(width, width, key=keys[1])
            self.up = eqx.nn.Linear(width, 4 * width, key=keys[2])
            self.down = eqx.nn.Linear(4 * width, width, key=keys[3])

        def __call__(self, x):  # (tokens, width)
            q, k, v = jnp.split(jax.vmap(self.qkv)(jax.vmap(self.norms[0])(x)), 3, -1)
            q, k, v = (a.reshape(len(x), heads, -1).swapaxes(0, 1) for a in (q, k, v))
            scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
            scores = jnp.where(jnp.tril(jnp.ones((len(x), len(x)), bool)), scores, -1e9)
            seen = (jax.nn.softmax(scores) @ v).swapaxes(0, 1).reshape(len(x), width)
            x = x + jax.vmap(self.out)(seen)
            hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
            return x + jax.vmap(self.down)(hidden)

    class Net(eqx.Module):
        words: jax.Array
        places: jax.Array
        blocks: list
        norm: eqx.nn.LayerNorm

        def __call__(self, x):  # (sequences, tokens)
            def one(x):
                hidden = self.words[x] + self.places
                for block in self.blocks:
                    hidden = block(hidden)
                return jax.vmap(self.norm)(hidden) @ self.words.T

            return jax.vmap(one)(x)

    keys = jax.random.split(jax.random.key(0), 9)
    model = Net(
        0.05 * jax.random.normal(keys[0], (words, width)),
        0.05 * jax.random.normal(keys[1], (length, width)),
        [Block(key) for key in keys[2:7]],
        eqx.nn.LayerNorm(width),
    )

    def loss(model, batch):
        picked = jnp.take_along_axis(jax.nn.log_softmax(model(batch.x)), batch.y[..., None], -1)
        return -jnp.mean(picked)

    of = lambda key: (lambda x: ax.Batch(x[:, :-1], x[:, 1:]))(  # noqa: E731
        jax.random.randint(key, (1, length + 1), 0, words)
    )
    return model, loss, 0.01, ax.Task(of(keys[7]), of(keys[8]))


MODELS = {
    "mlp": mlp,
    "conv4-28": images(28),
    "conv4-84": images(84),
    "lstm": lstm,
    "transformer": transformer,
}


def auto(jax, loss, model, task):
    """The order that `"auto"` takes."""
    import equinox as eqx

    from adaptax import modes

    params, fixed = eqx.partition(model, eqx.is_inexact_array)
    jaxpr = jax.make_jaxpr(lambda p: loss(eqx.combine(p, fixed), task.support))(params).jaxpr
    return "forward" if modes.suits_forward(jaxpr) else "reverse"


def worker(name, mode, steps):
    import equinox as eqx
    import jax

    import adaptax as ax

    model, loss, lr, task = MODELS[name](ax, jax)
    learner = ax.MAML(loss, inner_lr=lr, inner_steps=steps, meta_gradient=mode)
    params, fixed = eqx.partition(model, eqx.is_inexact_array)
    batch = jax.tree.map(lambda leaf: leaf[None], task)

    def meta_gradient(params, batch):
        return ax.meta_value_and_grad(
            learner, eqx.combine(params, fixed), batch, key=jax.random.key(0), mapping="scan"
        )[1]

    start = time.perf_counter()
    compiled = jax.jit(meta_gradient).lower(params, batch).compile()
    info = {
        "compile_seconds": time.perf_counter() - start,
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "parameters": ax.tree.count(model),
        "auto": auto(jax, loss, model, task),
    }
    if info["temporary_mb"] * 2**20 > LARGEST:
        return measure.serve(lambda: None, too_large=True, **info)
    seconds = 0.0
    for _ in range(2):
        if seconds > 1:
            break
        start = time.perf_counter()
        gradient = jax.block_until_ready(compiled(params, batch))
        seconds = time.perf_counter() - start
    norm, calls = float(ax.tree.norm(gradient)), max(1, int(0.1 / seconds))

    def run():
        for _ in range(calls):
            jax.block_until_ready(compiled(params, batch))

    measure.serve(run, calls=calls, gradient_norm=norm, **info)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="inner steps")
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the results there, beside those of other models")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(**json.loads(args.worker))
    results, peak = [], measure.matmul_peak()
    measure.machine(peak)
    for name in args.models:
        for steps in args.steps:
            names = {
                json.dumps({"name": name, "mode": mode, "steps": steps}): mode
                for mode in args.modes
            }
            found = measure.take_turns(__file__, list(names), args.repeats)
            for key, record in found.items():
                row = {"model": name, "steps": steps, "mode": names[key], **record}
                calls = row.pop("calls", 1)
                row.pop("all_seconds")
                for unit in ("seconds", "cpu_seconds"):
                    row[unit] = None if row.get("too_large") else row[unit] / calls
                results.append(row)
            if args.json:
                save(args.json, results, peak)
    measure.table(
        "A meta-gradient of one task, second order",
        ["model", "steps", "mode", "ms", "core-ms", "temporary MB", "peak MB", "compile s"],
        [
            (r["model"], r["steps"], r["mode"],
             *("-" if r[unit] is None else 1e3 * r[unit] for unit in ("seconds", "cpu_seconds")),
             r["temporary_mb"], round(r["running_mb"]), r["compile_seconds"])
            for r in results
        ],
    )  # fmt: skip


def save(path, results, peak):
    """Keep the rows of other configurations that are there."""
    old = json.loads(Path(path).read_text())["results"] if Path(path).exists() else []
    now = {(r["model"], r["steps"], r["mode"]) for r in results}
    kept = [r for r in old if (r["model"], r["steps"], r["mode"]) not in now]
    order = [list(MODELS), list(MODES)]
    place = lambda r: (order[0].index(r["model"]), r["steps"], order[1].index(r["mode"]))  # noqa: E731
    measure.save(path, matmul_peak_gflops=round(peak, 1), results=sorted(kept + results, key=place))


if __name__ == "__main__":
    main()

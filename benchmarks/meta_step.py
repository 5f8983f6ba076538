"""One second-order MAML meta-step on Omniglot's network, side by side with PyTorch.

5-way 1-shot, 15 queries a class, 5 inner steps, 16 tasks; the four-block network with strides,
biases, batch normalisation by the batch (shift only) and ReLU; every parameter adapted. All start
from the same weights and see the same tasks, and their meta-gradients are compared, once in
float64, where they must be equal, and in the float32 of the measurement. Ratios are to the faster
of PyTorch with all cores and with one.

    python benchmarks/meta_step.py --json benchmarks/results/meta_step.json
"""

import argparse
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

WAY, QUERY, TASKS, STEPS, LR, FILTERS, EPS = 5, 15, 16, 5, 0.1, 64, 1e-3
IMPLEMENTATIONS = ["torch eager", "adaptax Conv4", "adaptax Flax NNX"]
EXACT = ", float64"
GRADIENTS = Path(tempfile.gettempdir()) / "adaptax_meta_step"


def weights(dtype):
    """`conv{i}` (h, w, in, out) and `bias{i}`, `shift{i}`, then `head` and `head_bias`."""
    rng = np.random.default_rng(0)
    made, channels = {}, 1
    for i in range(4):
        made[f"conv{i}"] = rng.normal(size=(3, 3, channels, FILTERS)) / np.sqrt(9 * channels)
        made[f"bias{i}"], made[f"shift{i}"] = np.zeros(FILTERS), np.zeros(FILTERS)
        channels = FILTERS
    made["head"] = rng.normal(size=(FILTERS, WAY)) / np.sqrt(FILTERS)
    made["head_bias"] = np.zeros(WAY)
    return {name: value.astype(dtype) for name, value in made.items()}


def tasks(dtype):
    """Support and query of all tasks: images `(tasks, n, 28, 28, 1)` and labels `(tasks, n)`."""
    rng = np.random.default_rng(1)
    labels = np.tile(np.arange(WAY), (TASKS, 1))
    xs, xq = (
        rng.random((TASKS, n, 28, 28, 1)).astype(dtype) for n in (WAY, WAY * QUERY)
    )  # fmt: skip
    return xs, labels, xq, np.repeat(labels, QUERY, axis=1)


def run_torch(dtype, threads=measure.CORES):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    # Padding "SAME" puts an even image's extra row last, PyTorch's first: mirror the images and
    # the kernels, and the two networks are the same function.
    start = time.perf_counter()
    params = {
        name: torch.tensor(to_torch(name, value)).requires_grad_()
        for name, value in weights(dtype).items()
    }
    names, ones = list(params), torch.ones_like(params["shift0"]).detach()
    xs, ys, xq, yq = (torch.tensor(a) for a in tasks(dtype))
    xs, xq = (x.flip(2, 3).permute(0, 1, 4, 2, 3).contiguous() for x in (xs, xq))

    def net(p, x):
        for i in range(4):
            x = F.conv2d(x, p[f"conv{i}"], p[f"bias{i}"], stride=2, padding=1)
            x = F.relu(F.batch_norm(x, None, None, ones, p[f"shift{i}"], True, 0.0, EPS))
        return F.linear(x.mean((2, 3)), p["head"], p["head_bias"])

    def step():
        for p in params.values():
            p.grad = None
        total = 0.0
        for i in range(TASKS):
            adapted = params
            for _ in range(STEPS):
                loss = F.cross_entropy(net(adapted, xs[i]), ys[i])
                grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
                adapted = {n: adapted[n] - LR * g for n, g in zip(names, grads)}
            loss = F.cross_entropy(net(adapted, xq[i]), yq[i]) / TASKS
            loss.backward()
            total += loss.item()
        return total

    value = step()
    first = time.perf_counter() - start
    grads = {name: from_torch(name, p.grad.numpy()) for name, p in params.items()}
    return step, value, grads, {"compile_seconds": first, "threads": threads}


def to_torch(name, value):
    if name.startswith("conv"):
        return value[::-1, ::-1].transpose(3, 2, 0, 1).copy()
    return value.T.copy() if name == "head" else value


def from_torch(name, value):
    if name.startswith("conv"):
        return value.transpose(2, 3, 1, 0)[::-1, ::-1]
    return value.T if name == "head" else value


def run_adaptax(dtype, build, fast_path=True):
    measure.host_devices()
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import adaptax as ax
    from adaptax.engine.mapping import local_mesh

    jax.config.update("jax_enable_x64", dtype == np.float64)
    model, read = build({name: jnp.asarray(value) for name, value in weights(dtype).items()})
    learner = ax.MAML(
        ax.losses.cross_entropy, inner_lr=LR, inner_steps=STEPS, adapt_only=ax.tree.every
    )
    xs, ys, xq, yq = (jnp.asarray(a) for a in tasks(dtype))
    batch = ax.Task(ax.Batch(xs, ys), ax.Batch(xq, yq))
    params, fixed = eqx.partition(model, eqx.is_inexact_array)
    mesh = local_mesh(TASKS)

    def meta_step(params, batch):
        (value, _), grads = ax.meta_value_and_grad(
            learner, eqx.combine(params, fixed), batch, key=jax.random.key(0), mapping="scan",
            mesh=mesh, fast_path=fast_path,
        )  # fmt: skip
        return value, grads

    start = time.perf_counter()
    compiled = jax.jit(meta_step).lower(params, batch).compile()
    seconds = time.perf_counter() - start
    value, grads = jax.block_until_ready(compiled(params, batch))

    def step():
        jax.block_until_ready(compiled(params, batch))

    info = {"compile_seconds": seconds, "devices": 1 if mesh is None else mesh.size}
    info["temporary_mb"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return step, float(value), jax.tree.map(np.asarray, read(grads)), info


def conv4(w):
    import equinox as eqx
    import jax

    import adaptax as ax

    def leaves(model):
        blocks = [(conv.weight, conv.bias, norm.shift) for conv, norm in model.blocks]
        return [*(leaf for block in blocks for leaf in block), model.head.weight, model.head.bias]

    model = ax.models.Conv4(out=WAY, key=jax.random.key(0))
    return eqx.tree_at(leaves, model, list(w.values())), lambda m: dict(zip(w, leaves(m)))


def flax(w):
    import jax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.convs = nnx.List(
                nnx.Conv(1 if i == 0 else FILTERS, FILTERS, (3, 3), strides=2, rngs=rngs)
                for i in range(4)
            )
            self.norms = nnx.List(
                nnx.BatchNorm(
                    FILTERS, use_running_average=False, use_scale=False, epsilon=EPS, rngs=rngs
                )
                for _ in range(4)
            )
            self.head = nnx.Linear(FILTERS, WAY, rngs=rngs)

        def __call__(self, x):
            for conv, norm in zip(self.convs, self.norms):
                x = nnx.relu(norm(conv(x)))
            return self.head(jax.numpy.mean(x, axis=(1, 2)))

    def variables(model):
        made = {}
        for i, (conv, norm) in enumerate(zip(model.convs, model.norms)):
            made |= {f"conv{i}": conv.kernel, f"bias{i}": conv.bias, f"shift{i}": norm.bias}
        return made | {"head": model.head.kernel, "head_bias": model.head.bias}

    model = Net(nnx.Rngs(0))
    for name, variable in variables(model).items():
        variable.set_value(w[name])
    return model, lambda m: {name: v.get_value() for name, v in variables(m).items()}


def worker(name):
    dtype = np.float64 if name.endswith(EXACT) else np.float32
    step, value, grads, info = {
        "torch eager": lambda: run_torch(dtype),
        "torch eager, one thread": lambda: run_torch(dtype, threads=1),
        "adaptax Conv4": lambda: run_adaptax(dtype, conv4),
        "adaptax Flax NNX": lambda: run_adaptax(dtype, flax),
        "adaptax Flax NNX, native": lambda: run_adaptax(dtype, flax, fast_path=False),
    }[name.removesuffix(EXACT)]()
    GRADIENTS.mkdir(exist_ok=True)
    np.savez(GRADIENTS / f"{name}.npz", **grads)
    measure.serve(step, meta_loss=value, **info)


def disagreement(name, precision):
    """Largest difference from PyTorch's meta-gradient, relative to each array's largest entry.

    The biases before batch normalisation have gradient zero, and are compared with the head's.
    """
    ours, theirs = (np.load(GRADIENTS / f"{n}{precision}.npz") for n in (name, "torch eager"))
    sizes = {n: np.abs(theirs["head" if n.startswith("bias") else n]).max() for n in theirs}
    return float(max(np.abs(ours[n] - theirs[n]).max() / size for n, size in sizes.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--native", action="store_true", help="Flax without the fast path, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    names = [*IMPLEMENTATIONS, "torch eager, one thread"] + [
        "adaptax Flax NNX, native"
    ] * args.native
    for name in IMPLEMENTATIONS:
        measure.Worker(__file__, name + EXACT).stop()
    results = measure.take_turns(__file__, names, args.repeats)
    # Beside a busy neighbour, PyTorch's threads wait for each other, and one of them is faster.
    base = min(r["seconds"] for name, r in results.items() if name.startswith("torch"))
    for name, record in results.items():
        record["times_faster_than_torch"] = base / record["seconds"]
        record["gradient_difference_float32"] = disagreement(name, "")
        if name in IMPLEMENTATIONS:
            record["gradient_difference_float64"] = disagreement(name, EXACT)
    measure.table(
        "Second-order MAML meta-step, Omniglot conv4, 16 tasks, 5 steps",
        ["", "s / step", "processor s", "× best torch", "first call s", "peak MB", "of it running",
         "Δ gradient", "in float64"],
        [
            (name, r["seconds"], r["cpu_seconds"], r["times_faster_than_torch"],
             r["compile_seconds"], round(r["peak_mb"]), round(r["running_mb"]),
             f"{r['gradient_difference_float32']:.0e}",
             f"{r['gradient_difference_float64']:.0e}" if name in IMPLEMENTATIONS else "")
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, results=results)


if __name__ == "__main__":
    main()

"""One second-order MAML meta-step on Omniglot's or miniImageNet's net, side by side with PyTorch.

5-way 1-shot, 15 queries a class, 5 inner steps; the four-block network with biases, batch
normalisation by the batch (shift only) and ReLU; every parameter adapted. `--images 28`: strides,
64 filters, 16 tasks. `--images 84`: max pooling, 32 filters, 4 tasks. All start from the same
weights and see the same tasks, and their meta-gradients are compared, once in float64, where they
must be equal, and in the float32 of the measurement. Ratios are to the faster of PyTorch with all
cores and with one.

    python benchmarks/meta_step.py --json benchmarks/results/meta_step.json
    python benchmarks/meta_step.py --images 84 --json benchmarks/results/meta_step-84.json
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

WAY, QUERY, STEPS, LR, EPS = 5, 15, 5, 0.1, 1e-3
SIDE = int(os.environ.get("META_STEP_SIDE", "28"))  # of the workers, from the command line
FIRST_ORDER = os.environ.get("META_STEP_FIRST_ORDER") == "1"
TASKS, FILTERS, CHANNELS = (16, 64, 1) if SIDE == 28 else (4, 32, 3)
STRIDE = 2 if SIDE == 28 else 1
FEATURES = FILTERS if SIDE == 28 else FILTERS * (SIDE // 16) ** 2
IMPLEMENTATIONS = ["torch eager", "adaptax Conv4", "adaptax Flax NNX"]
EXACT = ", float64"
GRADIENTS = Path(tempfile.gettempdir()) / "adaptax_meta_step"


def weights(dtype):
    """`conv{i}` (h, w, in, out) and `bias{i}`, `shift{i}`, then `head` and `head_bias`."""
    rng = np.random.default_rng(0)
    made, channels = {}, CHANNELS
    for i in range(4):
        made[f"conv{i}"] = rng.normal(size=(3, 3, channels, FILTERS)) / np.sqrt(9 * channels)
        made[f"bias{i}"], made[f"shift{i}"] = np.zeros(FILTERS), np.zeros(FILTERS)
        channels = FILTERS
    made["head"] = rng.normal(size=(FEATURES, WAY)) / np.sqrt(FEATURES)
    made["head_bias"] = np.zeros(WAY)
    return {name: value.astype(dtype) for name, value in made.items()}


def tasks(dtype, shot=1):
    """Support and query of all tasks: images `(tasks, n, h, w, c)` and labels `(tasks, n)`."""
    rng = np.random.default_rng(1)
    labels = np.tile(np.arange(WAY), (TASKS, 1))
    xs, xq = (
        rng.random((TASKS, n, SIDE, SIDE, CHANNELS)).astype(dtype)
        for n in (WAY * shot, WAY * QUERY)
    )
    return xs, np.repeat(labels, shot, axis=1), xq, np.repeat(labels, QUERY, axis=1)


def torch_problem(dtype, threads, shot=1):
    """Parameters, network and tasks, for PyTorch."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    # Padding "SAME" puts an even image's extra row last, PyTorch's first: mirror the images and
    # the kernels, and the two networks are the same function. Without strides there is none.
    params = {
        name: torch.tensor(to_torch(name, value)).requires_grad_()
        for name, value in weights(dtype).items()
    }
    ones = torch.ones_like(params["shift0"]).detach()
    xs, ys, xq, yq = (torch.tensor(a) for a in tasks(dtype, shot))
    xs, xq = (x.flip(2, 3) if STRIDE > 1 else x for x in (xs, xq))
    xs, xq = (x.permute(0, 1, 4, 2, 3).contiguous() for x in (xs, xq))

    def net(p, x):
        for i in range(4):
            x = F.conv2d(x, p[f"conv{i}"], p[f"bias{i}"], stride=STRIDE, padding=1)
            x = F.relu(F.batch_norm(x, None, None, ones, p[f"shift{i}"], True, 0.0, EPS))
            x = x if STRIDE > 1 else F.max_pool2d(x, 2)
        x = x.mean((2, 3)) if STRIDE > 1 else x.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x, p["head"], p["head_bias"])

    return params, net, (xs, ys, xq, yq)


def run_torch(dtype, threads=measure.CORES):
    import torch
    import torch.nn.functional as F

    start = time.perf_counter()
    params, net, (xs, ys, xq, yq) = torch_problem(dtype, threads)
    names = list(params)

    def step():
        for p in params.values():
            p.grad = None
        total = 0.0
        for i in range(TASKS):
            adapted = params
            for _ in range(STEPS):
                loss = F.cross_entropy(net(adapted, xs[i]), ys[i])
                grads = torch.autograd.grad(
                    loss, list(adapted.values()), create_graph=not FIRST_ORDER
                )
                adapted = {n: adapted[n] - LR * g for n, g in zip(names, grads)}
            loss = F.cross_entropy(net(adapted, xq[i]), yq[i]) / TASKS
            loss.backward()
            total += loss.item()
        return total

    value = step()
    first = time.perf_counter() - start
    grads = {name: from_torch(name, p.grad.numpy()) for name, p in params.items()}
    return step, value, grads, {"compile_seconds": first, "threads": threads}


def run_torch_func(dtype, compiled=False):
    """Map the tasks by `torch.func.vmap`; the whole step in `torch.compile` if asked."""
    import torch
    import torch.nn.functional as F

    start = time.perf_counter()
    params, net, batch = torch_problem(dtype, measure.CORES)
    params = {name: p.detach() for name, p in params.items()}

    def task_loss(params, xs, ys, xq, yq):
        slope = torch.func.grad(lambda p: F.cross_entropy(net(p, xs), ys))
        adapted = params
        for _ in range(STEPS):
            grads = slope(adapted)
            grads = {n: g.detach() for n, g in grads.items()} if FIRST_ORDER else grads
            adapted = {n: p - LR * grads[n] for n, p in adapted.items()}
        return F.cross_entropy(net(adapted, xq), yq)

    def meta_loss(params):
        return torch.func.vmap(task_loss, (None, 0, 0, 0, 0))(params, *batch).mean()

    whole = torch.func.grad_and_value(meta_loss)
    whole = torch.compile(whole) if compiled else whole
    grads, value = whole(params)
    first = time.perf_counter() - start
    grads = {name: from_torch(name, g.numpy()) for name, g in grads.items()}
    info = {"compile_seconds": first, "threads": measure.CORES}
    return lambda: whole(params), float(value), grads, info


def to_torch(name, value):
    if name.startswith("conv"):
        value = value[::-1, ::-1] if STRIDE > 1 else value
        return value.transpose(3, 2, 0, 1).copy()
    return value.T.copy() if name == "head" else value


def from_torch(name, value):
    if name.startswith("conv"):
        value = value.transpose(2, 3, 1, 0)
        return value[::-1, ::-1] if STRIDE > 1 else value
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
        ax.losses.cross_entropy, inner_lr=LR, inner_steps=STEPS, adapt_only=ax.tree.every,
        first_order=FIRST_ORDER,
    )  # fmt: skip
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
    if dtype == np.float32:
        info["gflop"] = 1e-9 * TASKS * operations(learner, model, batch)
    return step, float(value), jax.tree.map(np.asarray, read(grads)), info


def operations(learner, model, batch):
    """Operations of the meta-gradient of one task, as ours counts them."""
    import equinox as eqx
    import jax

    import adaptax as ax
    from adaptax.engine.work import work

    params, fixed = eqx.partition(model, eqx.is_inexact_array)

    def one(params, task):
        return ax.meta_value_and_grad(
            learner, eqx.combine(params, fixed), task, key=jax.random.key(0), mapping="scan"
        )[1]

    return work(one, params, jax.tree.map(lambda leaf: leaf[:1], batch)).operations


def conv4(w):
    import equinox as eqx
    import jax

    import adaptax as ax

    def leaves(model):
        blocks = [(conv.weight, conv.bias, norm.shift) for conv, norm in model.blocks]
        return [*(leaf for block in blocks for leaf in block), model.head.weight, model.head.bias]

    net = {} if SIDE == 28 else ax.models.CONV4["maml mini_imagenet"]
    model = ax.models.Conv4(out=WAY, key=jax.random.key(0), **net)
    return eqx.tree_at(leaves, model, list(w.values())), lambda m: dict(zip(w, leaves(m)))


def flax(w):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.convs = nnx.List(
                nnx.Conv(c, FILTERS, (3, 3), strides=STRIDE, rngs=rngs)
                for c in (CHANNELS, FILTERS, FILTERS, FILTERS)
            )
            self.norms = nnx.List(
                nnx.BatchNorm(
                    FILTERS, use_running_average=False, use_scale=False, epsilon=EPS, rngs=rngs
                )
                for _ in range(4)
            )
            self.head = nnx.Linear(FEATURES, WAY, rngs=rngs)

        def __call__(self, x):
            for conv, norm in zip(self.convs, self.norms):
                x = nnx.relu(norm(conv(x)))
                x = x if STRIDE > 1 else nnx.max_pool(x, (2, 2), (2, 2))
            return self.head(x.mean((1, 2)) if STRIDE > 1 else x.reshape(len(x), -1))

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
        "torch vmap": lambda: run_torch_func(dtype),
        "torch compile": lambda: run_torch_func(dtype, compiled=True),
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
    parser.add_argument("--compile", action="store_true", help="torch.compile, which takes minutes")
    parser.add_argument("--images", type=int, choices=(28, 84), default=28, help="their side")
    parser.add_argument("--first-order", action="store_true")
    parser.add_argument("--inexact", action="store_true", help="without the check in float64")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["META_STEP_SIDE"] = str(args.images)
    os.environ["META_STEP_FIRST_ORDER"] = str(int(args.first_order))
    if args.worker:
        return worker(args.worker)
    names = [
        *IMPLEMENTATIONS, "torch eager, one thread", "torch vmap",
        *["torch compile"] * args.compile, *["adaptax Flax NNX, native"] * args.native,
    ]  # fmt: skip
    peak = measure.matmul_peak()
    measure.machine(peak)
    exact = [] if args.inexact else IMPLEMENTATIONS
    for name in exact:
        measure.Worker(__file__, name + EXACT).stop()
    results = measure.take_turns(__file__, names, args.repeats)
    # Beside a busy neighbour, PyTorch's threads wait for each other, and one of them is faster.
    base = min(r["seconds"] for name, r in results.items() if name.startswith("torch"))
    for name, record in results.items():
        record["times_faster_than_torch"] = base / record["seconds"]
        gflop = results["adaptax Conv4"]["gflop"]
        record["share_of_matmul_peak"] = gflop / record["seconds"] / peak
        record["gradient_difference_float32"] = disagreement(name, "")
        if name in exact:
            record["gradient_difference_float64"] = disagreement(name, EXACT)
    measure.table(
        f"{'First' if args.first_order else 'Second'}-order MAML meta-step, images of "
        f"{args.images}x{args.images}, {16 if args.images == 28 else 4} tasks, 5 steps",
        ["", "s / step", "core-seconds", "× best torch", "% of matmul", "first call s",
         "peak MB", "of it running",
         "Δ gradient", "in float64"],
        [
            (name, r["seconds"], r["cpu_seconds"], r["times_faster_than_torch"],
             round(100 * r["share_of_matmul_peak"]), r["compile_seconds"],
             round(r["peak_mb"]), round(r["running_mb"]),
             f"{r['gradient_difference_float32']:.0e}",
             f"{r['gradient_difference_float64']:.0e}" if name in exact else "")
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, matmul_peak_gflops=round(peak, 1), results=results)


if __name__ == "__main__":
    main()

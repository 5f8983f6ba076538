"""Adapting to a 5-way 5-shot task and predicting 75 queries, compiled, side by side with PyTorch.

The networks of `meta_step.py`: `--images 28` with 5 steps, `--images 84` with 10; all parameters
are adapted, by first derivatives. Predictions are compared.

    python benchmarks/adapt.py --json benchmarks/results/adapt.json
    python benchmarks/adapt.py --images 84 --json benchmarks/results/adapt-84.json
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

SHOT, LR = 5, 0.01
NAMES = ["torch eager", "torch eager, one thread", "adaptax.predict"]
OUTPUTS = Path(tempfile.gettempdir()) / "adaptax_adapt"


def run_torch(base, steps, threads):
    import torch
    import torch.nn.functional as F

    params, net, (xs, ys, xq, _) = base.torch_problem(np.float32, threads, SHOT)

    def run():
        adapted = params
        for _ in range(steps):
            loss = F.cross_entropy(net(adapted, xs[0]), ys[0])
            grads = torch.autograd.grad(loss, list(adapted.values()))
            moved = zip(adapted.items(), grads)
            adapted = {n: (p - LR * g).detach().requires_grad_() for (n, p), g in moved}
        with torch.no_grad():
            return net(adapted, xq[0]).numpy()

    return run


def run_adaptax(base, steps):
    measure.host_devices()
    import jax
    import jax.numpy as jnp

    import adaptax as ax

    weights = {name: jnp.asarray(value) for name, value in base.weights(np.float32).items()}
    model, _ = base.conv4(weights)
    learner = ax.MAML(
        ax.losses.cross_entropy, inner_lr=LR, inner_steps=steps, adapt_only=ax.tree.every
    )
    xs, ys, xq, _ = (jnp.asarray(a[0]) for a in base.tasks(np.float32, SHOT))
    support, key = ax.Batch(xs, ys), jax.random.key(0)
    return lambda: np.asarray(ax.predict(learner, model, support, xq, key=key))


def worker(name):
    import meta_step as base

    steps = 5 if base.SIDE == 28 else 10
    start = time.perf_counter()
    run = {
        "torch eager": lambda: run_torch(base, steps, measure.CORES),
        "torch eager, one thread": lambda: run_torch(base, steps, 1),
        "adaptax.predict": lambda: run_adaptax(base, steps),
    }[name]()
    predicted = run()
    first = time.perf_counter() - start
    OUTPUTS.mkdir(exist_ok=True)
    np.save(OUTPUTS / f"{name}.npy", predicted)
    run()
    measure.serve(run, first_seconds=first)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, choices=(28, 84), default=28, help="their side")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    os.environ["META_STEP_SIDE"] = str(args.images)
    peak = measure.matmul_peak()
    measure.machine(peak)
    results = measure.take_turns(__file__, NAMES, args.repeats)
    base = min(r["seconds"] for name, r in results.items() if name.startswith("torch"))
    expected = np.load(OUTPUTS / "torch eager.npy")
    for name, record in results.items():
        record["times_faster_than_torch"] = base / record["seconds"]
        away = np.abs(np.load(OUTPUTS / f"{name}.npy") - expected).max()
        record["difference_of_predictions"] = float(away / np.abs(expected).max())
    measure.table(
        f"Adapt and predict, 5-way 5-shot, images of {args.images}x{args.images}",
        ["", "ms", "core-ms", "× best torch", "first call s", "peak MB", "Δ predictions"],
        [
            (name, 1e3 * r["seconds"], 1e3 * r["cpu_seconds"], r["times_faster_than_torch"],
             r["first_seconds"], round(r["peak_mb"]), f"{r['difference_of_predictions']:.0e}")
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, matmul_peak_gflops=round(peak, 1), results=results)


if __name__ == "__main__":
    main()

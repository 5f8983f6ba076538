"""One LEO meta-step on embeddings of the paper's width, side by side with PyTorch.

5-way, 1-shot and 5-shot, 15 queries a class, 12 tasks, embeddings of width 640, codes of width 64,
5 steps in the latent space and 5 of fine-tuning, second order throughout; the paper's settings for
miniImageNet. A step is everything up to the gradient: dropout masks and noise are drawn in it.
PyTorch's is written plainly, task after task, with what saves it work: the regularisers once a
step, and the weights of all shots in one product.

Both start from the same weights. Their gradients are compared in float64, where PyTorch is given
the masks and noise that ours draws. Ratios are medians of those of single rounds, in which both
take a turn, to the faster of PyTorch with all cores and with one.

    python benchmarks/leo_step.py --json benchmarks/results/leo_step.json
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import measure
import numpy as np

WAY, QUERY, TASKS, WIDTH, LATENT, STEPS = 5, 15, 12, 640, 64, 5
SHOTS = (1, 5)
OFFSET = (2 / (WIDTH + WAY)) ** 0.5
EXACT = ", float64"
GRADIENTS = Path(tempfile.gettempdir()) / "adaptax_leo_step"
NAMES = ("encoder", "relation0", "relation1", "relation2", "decoder", "inner_lr", "finetune_lr")


def settings(shot):
    from adaptax.recipes import RECIPES

    return RECIPES[f"leo-mini_imagenet-5w{shot}s"].experiment.learner


def weights(dtype):
    """Xavier uniform matrices, and the rates."""
    rng, pair = np.random.default_rng(0), 2 * LATENT

    def glorot(n, m):
        return rng.uniform(-1, 1, (n, m)) * np.sqrt(6 / (n + m))

    made = [glorot(WIDTH, LATENT), *(glorot(pair, pair) for _ in range(3)),
            glorot(LATENT, 2 * WIDTH), np.ones(LATENT), np.full(WIDTH, 1e-3)]  # fmt: skip
    return {name: value.astype(dtype) for name, value in zip(NAMES, made)}


def tasks(dtype, shot):
    """Support `(tasks, way, shot, width)` and query `(tasks, way, query, width)`, unit vectors."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(TASKS, WAY, 1, WIDTH))
    x = centres + 1.5 * rng.normal(size=(TASKS, WAY, shot + QUERY, WIDTH))
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
    return x[:, :, :shot], x[:, :, shot:]


def run_torch(dtype, shot, threads, noise=None):
    """Noise, if given, is what ours draws: a list of arrays for each task, in the order of use."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    how, start = settings(shot), time.perf_counter()
    p = {n: torch.tensor(value).requires_grad_() for n, value in weights(dtype).items()}
    xs, xq = (torch.tensor(a) for a in tasks(dtype, shot))
    ys = torch.arange(WAY).repeat_interleave(shot)
    yq = torch.arange(WAY).repeat_interleave(QUERY)
    n = WAY * shot
    first, second = (i.ravel() for i in torch.meshgrid(*2 * [torch.arange(n)], indexing="ij"))
    drawn = None

    def normal(*shape):
        if drawn is not None:
            return torch.tensor(next(drawn))
        return torch.randn(*shape, dtype=xs.dtype)

    def drop(x):
        if drawn is not None:
            return x * torch.tensor(next(drawn)).reshape(x.shape) / (1 - how["dropout"])
        return F.dropout(x, how["dropout"])

    def encode(x):
        e = drop(x) @ p["encoder"]
        h = torch.cat([e[first], e[second]], 1)
        h = F.relu(F.relu(h @ p["relation0"]) @ p["relation1"]) @ p["relation2"]
        r = h.view(WAY, shot * n, 2 * LATENT).mean(1)
        r = r[:, None].expand(WAY, shot, 2 * LATENT)
        mean, u = r.chunk(2, -1)
        return mean, torch.clamp(torch.exp(u) - 1, min=1e-10)

    def decode(z):
        mean, u = (z @ p["decoder"]).chunk(2, -1)
        std = torch.clamp(torch.exp(u) - (1 - OFFSET), min=1e-10)
        return mean + std * normal(WAY, shot, WIDTH)

    def inner_loss(w, x):
        return F.cross_entropy(drop(x) @ w.mean(1).T, ys, reduction="sum")

    def one(x, queries):
        x = x.reshape(n, WIDTH)
        mean, std = encode(x)
        eps = normal(WAY, shot, LATENT)
        z = z0 = mean + std * eps
        w = decode(z)
        for _ in range(STEPS):
            (g,) = torch.autograd.grad(inner_loss(w, x), z, create_graph=True)
            z = z - p["inner_lr"] * g
            w = decode(z)
        penalty = torch.mean((z.detach() - z0) ** 2)
        for _ in range(STEPS):
            (g,) = torch.autograd.grad(inner_loss(w, x), w, create_graph=True)
            w = w - p["finetune_lr"] * g
        logits = drop(queries.reshape(-1, WIDTH)) @ w.mean(1).T
        kl = torch.mean((z0**2 - eps**2) / 2 - torch.log(std))
        return (F.cross_entropy(logits, yq) + how["kl_weight"] * kl
                + how["encoder_penalty"] * penalty)  # fmt: skip

    def step():
        nonlocal drawn
        for value in p.values():
            value.grad = None
        total = 0.0
        for i in range(TASKS):
            drawn = None if noise is None else iter(noise[i])
            loss = one(xs[i], xq[i]) / TASKS
            loss.backward()
            total += loss.item()
        rows = p["decoder"] / (p["decoder"].norm(dim=1, keepdim=True) + 1e-32)
        correlation = torch.mean((rows @ rows.T - torch.eye(LATENT, dtype=xs.dtype)) ** 2)
        l2 = sum((p[name] ** 2).sum() for name in NAMES[:5]) / 2
        extra = how["l2"] * l2 + how["orthogonality"] * correlation
        extra.backward()
        return total + extra.item()

    value = step()
    info = {"compile_seconds": time.perf_counter() - start, "threads": threads}
    return step, value, {name: p[name].grad.numpy() for name in NAMES}, info


def run_adaptax(dtype, shot, mapping="auto"):
    measure.host_devices()
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import adaptax as ax
    from adaptax.engine.mapping import local_mesh

    jax.config.update("jax_enable_x64", dtype == np.float64)
    key = jax.random.key(0)
    learner = ax.LEO(ax.losses.cross_entropy, **settings(shot))
    meta = learner.init(ax.models.Linear(WIDTH, WAY, key=key), key=key)

    def read(meta):
        networks = meta["networks"]
        return dict(zip(NAMES, [networks.encoder, *networks.relation, networks.decoder,
                                meta["inner_lr"], meta["finetune_lr"]]))  # fmt: skip

    meta = eqx.tree_at(lambda m: list(read(m).values()), meta,
                       [jnp.asarray(value) for value in weights(dtype).values()])  # fmt: skip

    def batch(x):
        labels = np.tile(np.repeat(np.arange(WAY), x.shape[2]), (TASKS, 1))
        return ax.Batch(jnp.asarray(x.reshape(TASKS, -1, WIDTH)), jnp.asarray(labels))

    task = ax.Task(*map(batch, tasks(dtype, shot)))
    trained, fixed = eqx.partition(meta, eqx.is_inexact_array)
    mesh = local_mesh(TASKS)

    def meta_step(trained, task, key):
        (value, _), grads = ax.meta_value_and_grad(
            learner, eqx.combine(trained, fixed), task, key=key, mapping=mapping, mesh=mesh
        )
        return value, grads

    start = time.perf_counter()
    compiled = jax.jit(meta_step).lower(trained, task, key).compile()
    seconds = time.perf_counter() - start
    value, grads = compiled(trained, task, key)

    def step():
        jax.block_until_ready(compiled(trained, task, key))

    info = {"compile_seconds": seconds, "devices": 1 if mesh is None else mesh.size}
    return step, float(value), {n: np.asarray(g) for n, g in read(grads).items()}, info


def draws(shot):
    """For each task the masks and noise of our learner with `key(0)`, in PyTorch's order of use."""
    import jax
    import jax.numpy as jnp

    from adaptax.algorithms.leo_terms import kept

    jax.config.update("jax_enable_x64", True)
    rate, n, found = settings(shot)["dropout"], WAY * shot, []
    for key in jax.random.split(jax.random.key(0), TASKS):
        code, noise, encoder, latent, tune, _ = jax.random.split(key, 6)

        def mask(key, n=n, shape=None):
            # PyTorch divides by 1 - rate, ours by the nearest multiple of 2^-16.
            scale = (1 - rate) * 2**16 / round((1 - rate) * 2**16)
            return scale * kept(key, rate, shape or (n, WIDTH))

        def normal(key, width):
            return jax.random.normal(key, (WAY, shot, width), jnp.float64)

        at = jax.random.fold_in
        used = [mask(encoder, shape=(WAY, shot, WIDTH)), normal(code, LATENT)]
        used += [normal(at(noise, 0), WIDTH)]
        for i in range(STEPS):
            used += [mask(at(latent, i)), normal(at(noise, i + 1), WIDTH)]
        used += [mask(at(tune, i)) for i in range(STEPS)]
        used += [mask(at(key, 1), WAY * QUERY)]
        found.append([np.asarray(a, np.float64) for a in used])
    return found


def parse(name):
    """Which implementation, shots and precision a worker is for."""
    kind, _, shot = name.removesuffix(EXACT).rpartition(", ")
    return kind, int(shot[0]), np.float64 if name.endswith(EXACT) else np.float32


def worker(name):
    kind, shot, dtype = parse(name)
    if kind == "adaptax":
        step, value, grads, info = run_adaptax(dtype, shot)
    else:
        noise = draws(shot) if dtype == np.float64 else None
        threads = 1 if kind.endswith("one thread") else measure.CORES
        step, value, grads, info = run_torch(dtype, shot, threads, noise)
    GRADIENTS.mkdir(exist_ok=True)
    np.savez(GRADIENTS / f"{name}.npz", **grads)
    measure.serve(step, meta_loss=value, **info)


def disagreement(shot):
    """Largest difference of the gradients in float64, relative to each array's largest entry."""
    ours, theirs = (np.load(GRADIENTS / f"{kind}, {shot}-shot{EXACT}.npz")
                    for kind in ("adaptax", "torch eager"))  # fmt: skip
    return float(max(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max() for n in NAMES))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    results, rows = {}, []
    for shot in SHOTS:
        for kind in ("torch eager", "adaptax"):
            measure.Worker(__file__, f"{kind}, {shot}-shot{EXACT}").stop()
        difference = disagreement(shot)
        if not difference < 1e-9:
            raise SystemExit(f"the gradients differ by {difference:.1e}: nothing to compare")
        kinds = ["adaptax", "torch eager"] + ["torch eager, one thread"] * (measure.CORES > 1)
        found = measure.take_turns(
            __file__, [f"{kind}, {shot}-shot" for kind in kinds], args.repeats
        )
        ours, *theirs = found.values()
        fastest = min(theirs, key=lambda record: record["seconds"])
        rounds = zip(fastest["all_seconds"], ours["all_seconds"])
        ours["times_faster_than_torch"] = statistics.median(a / b for a, b in rounds)
        ours["gradient_difference_float64"] = difference
        results |= found
        rows += [
            (name, r["seconds"], r["cpu_seconds"], r.get("times_faster_than_torch", ""),
             r["compile_seconds"], round(r["peak_mb"])) for name, r in found.items()
        ]  # fmt: skip
    measure.table(
        "LEO meta-step, 12 tasks, 5-way, embeddings of width 640",
        ["", "s / step", "processor s", "× best torch", "first call s", "peak MB"], rows,
    )  # fmt: skip
    for shot in SHOTS:
        print(f"{shot}-shot, gradient difference in float64: "
              f"{results[f'adaptax, {shot}-shot']['gradient_difference_float64']:.0e}")  # fmt: skip
    if args.json:
        measure.save(args.json, results=results)


if __name__ == "__main__":
    main()

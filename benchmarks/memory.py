"""Memory of a second-order MAML meta-step as the meta-batch and the inner loop grow.

Omniglot's network, 5-way 1-shot, 15 queries a class, one device. Each configuration is compiled
and run in a process of its own. `temporary` is what XLA's plan needs beside arguments and results,
and the number to look at; `resident` is what running it once added to the process.

    python benchmarks/memory.py --json benchmarks/results/memory.json
"""

import argparse
import json

import measure

WAY, QUERY = 5, 15
CONFIGURATIONS = [
    *({"mapping": "scan", "tasks": t, "steps": 5, "remat": False} for t in (4, 16, 64)),
    *({"mapping": "vmap", "tasks": t, "steps": 5, "remat": False} for t in (4, 16)),
    *({"mapping": "scan", "tasks": 4, "steps": s, "remat": True} for s in (5, 10, 50)),
    *({"mapping": "scan", "tasks": 4, "steps": s, "remat": False} for s in (10, 50)),
]


def worker(mapping, tasks, steps, remat):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import adaptax as ax

    model = ax.models.Conv4(out=WAY, key=jax.random.key(0))
    mode = "checkpoint=1" if remat else "reverse"
    learner = ax.MAML(ax.losses.cross_entropy, inner_lr=0.1, inner_steps=steps, meta_gradient=mode)
    labels = jnp.tile(jnp.arange(WAY), (tasks, 1))
    batch = ax.Task(
        ax.Batch(jnp.ones((tasks, WAY, 28, 28, 1)), labels),
        ax.Batch(jnp.ones((tasks, WAY * QUERY, 28, 28, 1)), jnp.repeat(labels, QUERY, axis=1)),
    )
    params, fixed = eqx.partition(model, eqx.is_inexact_array)

    def meta_step(params, batch):
        return ax.meta_value_and_grad(
            learner, eqx.combine(params, fixed), batch, key=jax.random.key(0), mapping=mapping
        )[1]

    compiled = jax.jit(meta_step).lower(params, batch).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready(batch)
    measure.forget_peak()
    before = measure.resident()
    jax.block_until_ready(compiled(params, batch))
    measure.say(temporary_mb=temporary, resident_mb=measure.peak() - before)
    measure.turn()
    measure.farewell()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(**json.loads(args.worker))
    results = []
    for configuration in CONFIGURATIONS:
        process = measure.Worker(__file__, json.dumps(configuration))
        results.append({**configuration, **process.info, "peak_mb": process.stop()["peak_mb"]})
    measure.table(
        "Memory of a meta-step, Omniglot conv4",
        ["mapping", "tasks", "steps", "remat", "temporary MB", "resident MB", "process peak MB"],
        [
            (r["mapping"], r["tasks"], r["steps"], r["remat"], round(r["temporary_mb"]),
             round(r["resident_mb"]), round(r["peak_mb"]))
            for r in results
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, results=results)


if __name__ == "__main__":
    main()

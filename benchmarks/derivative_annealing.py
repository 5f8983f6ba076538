"""MAML++'s derivative-order annealing: one program for both orders, at the price of each.

Before the threshold a meta-step should cost what one of first order costs, though the program
holds the second order too. Omniglot's network, 5-way 1-shot, 15 queries a class, 5 inner steps,
4 tasks, no multi-step loss, one device. Everything runs in one process, in turns, so that a change
in the machine's load falls on all alike; a ratio is the median over the turns. The pairs: with
that part alone, MAML++ against FOMAML and MAML; with all parts, against itself in one order.

    python benchmarks/derivative_annealing.py --json benchmarks/results/derivative_annealing.json
"""

import argparse
import functools
import statistics
import time

import measure

WAY, QUERY, TASKS, STEPS, LR, THRESHOLD = 5, 15, 4, 5, 0.1, 0.5
ALONE = {
    "per_step_batch_norm_statistics": None, "per_step_batch_norm_weights": False,
    "learned_rates": False,
}  # fmt: skip


def programs():
    """`{name: (call, seconds to compile, temporary memory in MB)}`."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import adaptax as ax

    loss, model = ax.losses.cross_entropy, ax.models.Conv4(out=WAY, key=jax.random.key(0))
    labels = jnp.tile(jnp.arange(WAY), (TASKS, 1))
    keys = jax.random.split(jax.random.key(1))
    tasks = ax.Task(
        ax.Batch(jax.random.uniform(keys[0], (TASKS, WAY, 28, 28, 1)), labels),
        ax.Batch(
            jax.random.uniform(keys[1], (TASKS, WAY * QUERY, 28, 28, 1)),
            jnp.repeat(labels, QUERY, axis=1),
        ),
    )

    def run(compiled, arguments):
        jax.block_until_ready(compiled(*arguments))

    def annealed(order, **parts):
        return ax.MAMLPlusPlus(
            loss, LR, STEPS, multi_step_loss=0, derivative_order_annealing=order, **parts
        )

    learners = {
        "FOMAML": ax.FOMAML(loss, LR, STEPS),
        "MAML": ax.MAML(loss, LR, STEPS),
        "MAML++, annealing alone": annealed(THRESHOLD, **ALONE),
        "MAML++, all parts, first order": annealed(1.0),
        "MAML++, all parts, second order": annealed(0.0),
        "MAML++, all parts": annealed(THRESHOLD),
    }
    made = {}
    for name, learner in learners.items():
        params, fixed = eqx.partition(
            learner.init(model, key=jax.random.key(0)), eqx.is_inexact_array
        )

        def meta_step(params, tasks, progress, learner=learner, fixed=fixed):
            return ax.meta_value_and_grad(
                learner, eqx.combine(params, fixed), tasks, key=jax.random.key(0),
                progress=progress, mapping="scan",
            )  # fmt: skip

        start = time.perf_counter()
        compiled = jax.jit(meta_step).lower(params, tasks, jnp.array(0.0)).compile()
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        both = getattr(learner, "derivative_order_annealing", None) == THRESHOLD
        for at, when in ((0.0, ", before"), (1.0, ", after")) if both else ((0.0, ""),):
            call = functools.partial(run, compiled, (params, tasks, jnp.array(at)))
            call()
            made[name + when] = call, seconds, memory
    return made


PAIRS = [
    ("MAML++, annealing alone, before", "FOMAML"),
    ("MAML++, annealing alone, after", "MAML"),
    ("MAML++, all parts, before", "MAML++, all parts, first order"),
    ("MAML++, all parts, after", "MAML++, all parts, second order"),
    ("MAML++, all parts, before", "FOMAML"),
    ("MAML++, all parts, after", "MAML"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    made = programs()
    seconds, processor = ({name: [] for name in made} for _ in range(2))
    for _ in range(args.repeats):
        for name, (call, *_) in made.items():
            start, cpu = time.perf_counter(), time.process_time()
            call()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - cpu)
    results = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "cpu_seconds": statistics.median(processor[name]),
            "compile_seconds": compiling, "temporary_mb": memory,
            "all_seconds": [round(s, 5) for s in seconds[name]],
        }
        for name, (_, compiling, memory) in made.items()
    }  # fmt: skip
    ratios = {
        f"{ours} / {other}": {
            kind: statistics.median(a / b for a, b in zip(taken[ours], taken[other], strict=True))
            for kind, taken in (("seconds", seconds), ("cpu_seconds", processor))
        }
        for ours, other in PAIRS
    }
    measure.table(
        "Meta-step, Omniglot conv4, 4 tasks, 5 steps, one device",
        ["", "s / step", "processor s", "compile s", "temporary MB"],
        [
            (name, r["seconds"], r["cpu_seconds"], r["compile_seconds"], round(r["temporary_mb"]))
            for name, r in results.items()
        ],
    )
    measure.table(
        "Time in turns",
        ["", "ratio", "of processor time"],
        [(pair, r["seconds"], r["cpu_seconds"]) for pair, r in ratios.items()],
    )
    if args.json:
        measure.save(args.json, results=results, ratios=ratios)


if __name__ == "__main__":
    main()

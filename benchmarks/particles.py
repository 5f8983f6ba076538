"""What ten particles of Bayesian MAML cost: `adaptax.fit` with ten of them beside one.

The released regression: MLP 1-40-40-40-1 with learned precisions, 5-shot, 5 queries, 10 tasks, one
step of chaser and leader, Adam. EMAML, M independent MAMLs of the same net, is timed likewise; and
classification, where heads on one extractor are the particles: Conv4 of 32 filters on images of
28×28, 5-way 1-shot, one query a class, 4 tasks, five steps, BFA. Tasks are sampled inside. Times
are milliseconds a meta-iteration without the first call, which compiles.

The cores are devices to JAX, as the command line makes them: `fit` shares the tasks of heavy
meta-iterations among them, and leaves light ones on one.

    python benchmarks/particles.py --json benchmarks/results/particles.json
"""

import argparse
import time

import measure
import numpy as np

TASKS, SHOT, LR, HIDDEN = 10, 5, 1e-3, (40, 40, 40)
WORKERS = {f"{name}, {count} particle{'s' * (count > 1)}": count
           for name in ("BMAML", "EMAML", "BMAML heads") for count in (1, 10)}  # fmt: skip
ITERATIONS = {"BMAML": 200, "EMAML": 200, "BMAML heads": 20}
"""Meta-iterations in one turn."""


class Enough(Exception):
    """No more turns."""


def run(name):
    measure.host_devices()
    import jax

    import adaptax as ax

    particles, kind = WORKERS[name], name.split(",")[0]
    tasks, meta_batch = ax.tasks.sinusoid(shot=SHOT, query=SHOT), TASKS
    model = ax.models.MLP(1, 1, HIDDEN, key=jax.random.key(0))
    if kind == "BMAML heads":
        images = np.random.default_rng(0).random((200, 28, 28, 1), np.float32)
        labels = np.repeat(np.arange(50), 4)
        tasks, meta_batch = ax.tasks.from_arrays(images, labels, way=5, shot=1, query=1), 4
        model = ax.models.Conv4(5, filters=32, head_init="glorot", key=jax.random.key(0))
        learner = ax.BayesianMAML(
            ax.losses.cross_entropy, 1.0, 5, particles=particles, objective="bfa",
            adapt_only=ax.tree.under("head"),
        )  # fmt: skip
    elif kind == "BMAML":
        model = ax.Gaussian(model)
        learner = ax.BayesianMAML(
            ax.gaussian_nll, LR, particles=particles, prior=ax.gamma_prior,
            chase=ax.tree.under("model"),
        )  # fmt: skip
    else:
        learner = ax.MAMLEnsemble(ax.losses.mse, LR, particles=particles)
    began, cpu, warm = time.perf_counter(), time.process_time(), False

    def watch(record):
        nonlocal began, cpu, warm
        seconds = time.perf_counter() - began
        if warm:
            measure.say(seconds=seconds, cpu_seconds=time.process_time() - cpu)
        else:
            measure.say(first_seconds=seconds)
        warm = True
        if not measure.turn():
            raise Enough
        began, cpu = time.perf_counter(), time.process_time()

    try:
        iterations = ITERATIONS[kind]
        ax.fit(learner, model, tasks.train, steps=1000 * iterations, chunk=iterations,
               meta_batch=meta_batch, key=jax.random.key(1), watch=watch)  # fmt: skip
    except Enough:
        measure.farewell()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return run(args.worker)
    results = measure.take_turns(__file__, list(WORKERS), args.repeats)
    for name, record in results.items():
        iterations = ITERATIONS[name.split(",")[0]]
        record["ms_per_meta_iteration"] = 1e3 * record["seconds"] / iterations
        record["cpu_ms_per_meta_iteration"] = 1e3 * record["cpu_seconds"] / iterations
        one = results[name.split(",")[0] + ", 1 particle"]
        for time_of in ("seconds", "cpu_seconds"):
            record[f"{time_of}_by_one_particle"] = record[time_of] / one[time_of]
    measure.table(
        "Regression, MLP 1-40-40-40-1, 10 tasks; heads on Conv4, 4 tasks of 5-way 1-shot",
        ["", "ms / meta-iteration", "processor ms", "× one particle", "in processor ms",
         "first call s", "peak MB"],
        [
            (name, r["ms_per_meta_iteration"], r["cpu_ms_per_meta_iteration"],
             r["seconds_by_one_particle"], r["cpu_seconds_by_one_particle"], r["first_seconds"],
             round(r["peak_mb"]))
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, iterations_a_turn=ITERATIONS, results=results)


if __name__ == "__main__":
    main()

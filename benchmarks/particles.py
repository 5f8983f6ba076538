"""What ten particles of Bayesian MAML cost: `adaptax.fit` with ten of them beside one.

The released regression: MLP 1-40-40-40-1 with learned precisions, 5-shot, 5 queries, 10 tasks, one
step of chaser and leader, Adam. EMAML, M independent MAMLs of the same net, is timed likewise.
Tasks are sampled inside. Times are milliseconds a meta-iteration without the first call, which
compiles.

    python benchmarks/particles.py --json benchmarks/results/particles.json
"""

import argparse
import time

import measure

TASKS, SHOT, LR, HIDDEN = 10, 5, 1e-3, (40, 40, 40)
WORKERS = {"BMAML, 1 particle": 1, "BMAML, 10 particles": 10,
           "EMAML, 1 particle": 1, "EMAML, 10 particles": 10}  # fmt: skip
ITERATIONS = 200
"""Meta-iterations in one turn."""


class Enough(Exception):
    """No more turns."""


def run(name):
    import jax

    import adaptax as ax

    particles = WORKERS[name]
    tasks = ax.tasks.sinusoid(shot=SHOT, query=SHOT)
    model = ax.models.MLP(1, 1, HIDDEN, key=jax.random.key(0))
    if name.startswith("BMAML"):
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
        ax.fit(learner, model, tasks.train, steps=1000 * ITERATIONS, chunk=ITERATIONS,
               meta_batch=TASKS, key=jax.random.key(1), watch=watch)  # fmt: skip
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
        record["ms_per_meta_iteration"] = 1e3 * record["seconds"] / ITERATIONS
        record["cpu_ms_per_meta_iteration"] = 1e3 * record["cpu_seconds"] / ITERATIONS
        one = results[name.split(",")[0] + ", 1 particle"]
        for time_of in ("seconds", "cpu_seconds"):
            record[f"{time_of}_by_one_particle"] = record[time_of] / one[time_of]
    measure.table(
        "Regression of BMAML, MLP 1-40-40-40-1, 10 tasks, 5-shot, 1 step",
        ["", "ms / meta-iteration", "processor ms", "× one particle", "first call s", "peak MB"],
        [
            (name, r["ms_per_meta_iteration"], r["cpu_ms_per_meta_iteration"],
             r["seconds_by_one_particle"], r["first_seconds"], round(r["peak_mb"]))
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, iterations_a_turn=ITERATIONS, results=results)


if __name__ == "__main__":
    main()

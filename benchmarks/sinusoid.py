"""MAML's sinusoid regression, whole training runs: `adaptax.fit` beside a PyTorch loop.

The paper's settings: MLP 1-40-40-1, 10-shot, 10 queries, 25 tasks, one step of 0.01, Adam 1e-3.
Tasks are sampled inside. Times are milliseconds a meta-iteration without the first, which
compiles; that one is given beside them.

    python benchmarks/sinusoid.py --json benchmarks/results/sinusoid.json
"""

import argparse
import time

import measure

TASKS, SHOT, LR, HIDDEN = 25, 10, 0.01, (40, 40)
ITERATIONS = {"torch eager": 20, "adaptax.fit": 500}
"""Meta-iterations in one turn."""


def run_torch():
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)  # such small arrays are slower on more
    torch.manual_seed(0)
    start = time.perf_counter()
    params = []
    for a, b in zip((1, *HIDDEN), (*HIDDEN, 1)):
        weight = torch.empty(b, a)
        torch.nn.init.xavier_uniform_(weight)
        params += [weight.requires_grad_(), torch.zeros(b, requires_grad=True)]
    optimizer = torch.optim.Adam(params, 1e-3)

    def net(p, x):
        x = F.relu(F.linear(x, p[0], p[1]))
        return F.linear(F.relu(F.linear(x, p[2], p[3])), p[4], p[5])

    def iterate(times=ITERATIONS["torch eager"]):
        for _ in range(times):
            optimizer.zero_grad()
            amplitude = torch.empty(TASKS, 1, 1).uniform_(0.1, 5.0)
            phase = torch.empty(TASKS, 1, 1).uniform_(0.0, torch.pi)
            x = torch.empty(TASKS, 2 * SHOT, 1).uniform_(-5.0, 5.0)
            y = amplitude * torch.sin(x - phase)
            total = 0.0
            for i in range(TASKS):
                loss = F.mse_loss(net(params, x[i, :SHOT]), y[i, :SHOT])
                grads = torch.autograd.grad(loss, params, create_graph=True)
                adapted = [p - LR * g for p, g in zip(params, grads)]
                total = total + F.mse_loss(net(adapted, x[i, SHOT:]), y[i, SHOT:])
            (total / TASKS).backward()
            optimizer.step()

    iterate(1)
    first = time.perf_counter() - start
    iterate(5)
    measure.serve(iterate, first_seconds=first)


class Enough(Exception):
    """No more turns."""


def run_adaptax():
    import jax

    import adaptax as ax

    tasks = ax.tasks.sinusoid(shot=SHOT, query=SHOT)
    model = ax.models.MLP(1, 1, HIDDEN, key=jax.random.key(0))
    learner = ax.MAML(ax.losses.mse, inner_lr=LR)
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

    chunk = ITERATIONS["adaptax.fit"]
    try:
        ax.fit(learner, model, tasks.train, steps=1000 * chunk, chunk=chunk, meta_batch=TASKS,
               key=jax.random.key(1), watch=watch)  # fmt: skip
    except Enough:
        measure.farewell()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return {"torch eager": run_torch, "adaptax.fit": run_adaptax}[args.worker]()
    results = measure.take_turns(__file__, list(ITERATIONS), args.repeats)
    for name, record in results.items():
        record["ms_per_meta_iteration"] = 1e3 * record["seconds"] / ITERATIONS[name]
        record["cpu_ms_per_meta_iteration"] = 1e3 * record["cpu_seconds"] / ITERATIONS[name]
    base = results["torch eager"]["ms_per_meta_iteration"]
    for record in results.values():
        record["times_faster_than_torch"] = base / record["ms_per_meta_iteration"]
    measure.table(
        "MAML sinusoid, MLP 1-40-40-1, 25 tasks, 10-shot, 1 step",
        ["", "ms / meta-iteration", "processor ms", "× torch", "first call s", "peak MB"],
        [
            (name, r["ms_per_meta_iteration"], r["cpu_ms_per_meta_iteration"],
             r["times_faster_than_torch"], r["first_seconds"],
             round(r["peak_mb"]))
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, iterations_a_turn=ITERATIONS, results=results)


if __name__ == "__main__":
    main()

"""MAML-TRPO in 2-D navigation: environment steps a second, roll-outs and updates included.

One meta-iteration of `adaptax.fit(..., outer=rl.TRPO())` beside PyTorch. Both: 20 tasks, 20
trajectories of 100 steps before and 20 after one policy-gradient step, that is 80 000 environment
steps; linear baseline, standardised advantages; TRPO on the adapted policies with exact second
derivatives, 10 conjugate-gradient iterations and a line search. The policy is MAML's, 2×100 ReLU.

The PyTorch side loops over tasks and time steps in Python, in three ways:

* `torch, one by one`: an environment object for every trajectory, and the policy called for each of
  its observations: a loop over tasks, trajectories and steps, as the default sampler of a toolkit.
* `torch, objects`: the policy acts for all trajectories of a task at once; the environments are
  still objects, stepped one by one. So do the published implementations of MAML, spread over
  worker processes (here there are none: one process, no pickling).
* `torch, batched`: one NumPy environment steps all trajectories of a task, which is what can be
  done without leaving Python.

Most of the arithmetic are products with the curvature of KL. The published implementations take
them on all trajectories; our recipes on a quarter (`TRPO(curvature=0.25)`), and a tenth learns
nearly as well (benchmarks/results/navigation-curvature.json). The quarter is measured on both
sides.

    python benchmarks/rl_steps.py --json benchmarks/results/rl_steps.json
"""

import argparse
import itertools
import math
import time

import measure

TASKS, TRAJECTORIES, HORIZON, LR, HIDDEN = 20, 20, 100, 0.1, (100, 100)
DISCOUNT, MAX_KL, CG_STEPS, DAMPING, BACKTRACK, TRIES = 0.99, 0.01, 10, 1e-5, 0.8, 15
STEPS = 2 * TASKS * TRAJECTORIES * HORIZON
"""Environment steps of a meta-iteration."""
ALL, QUARTER, TENTH = 1.0, 0.25, 0.1
TORCH = {
    "torch, one by one": ("one by one", ALL),
    "torch, objects": ("objects", ALL),
    "torch, batched": ("batched", ALL),
    "torch, batched, ¼ curvature": ("batched", QUARTER),
}
"""How they step environments, and the fraction of trajectories for the curvature."""
ADAPTAX = {
    "adaptax.fit": ALL,
    "adaptax.fit, ¼ curvature": QUARTER,
    "adaptax.fit, ⅒ curvature": TENTH,
}


def run_torch(stepping, curvature):
    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(measure.CORES)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    start = time.perf_counter()

    class Point:
        """One robot, as in the published environments."""

        def __init__(self, goal):
            self.goal = goal

        def reset(self):
            self.position = np.zeros(2, np.float32)
            return self.position

        def step(self, action):
            self.position = self.position + np.clip(0.1 * action, -0.1, 0.1)
            x, y = self.position - self.goal
            done = abs(x) < 0.01 and abs(y) < 0.01
            return self.position, -math.sqrt(x**2 + y**2), done, {}

    class Points:
        """All robots of a task."""

        def __init__(self, goal):
            self.goal = goal

        def reset(self):
            self.position = np.zeros((TRAJECTORIES, 2), np.float32)
            return self.position

        def step(self, action):
            self.position = self.position + np.clip(0.1 * action, -0.1, 0.1)
            away = self.position - self.goal
            return self.position, -np.linalg.norm(away, axis=1), (abs(away) < 0.01).all(1), {}

    class Separately:
        """Robots stepped one by one; those that have arrived are left alone."""

        def __init__(self, goal):
            self.envs = [Point(goal) for _ in range(TRAJECTORIES)]

        def reset(self):
            self.done = np.zeros(TRAJECTORIES, bool)
            return np.stack([env.reset() for env in self.envs])

        def step(self, actions):
            rewards = np.zeros(TRAJECTORIES, np.float32)
            for i, env in enumerate(self.envs):
                if not self.done[i]:
                    _, rewards[i], self.done[i], _ = env.step(actions[i])
            return np.stack([env.position for env in self.envs]), rewards, self.done.copy(), {}

    def mean_of(p, x):
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, p[0], p[1])), p[2], p[3])), p[4], p[5])

    def log_prob(p, x, action):
        z = (action - mean_of(p, x)) * torch.exp(-p[6])
        return -(z**2 / 2 + p[6] + math.log(2 * math.pi) / 2).sum(-1)

    def values(x, returns, mask):
        o = np.clip(x, -10, 10)
        t = np.broadcast_to(np.arange(HORIZON)[None, :, None] / 100, (*o.shape[:2], 1))
        phi = np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], -1) * mask[..., None]
        rows = phi.reshape(-1, phi.shape[-1])
        gram = rows.T @ rows + 1e-5 * np.eye(rows.shape[1])
        return phi @ np.linalg.solve(gram, rows.T @ (returns * mask).ravel())

    def roll_out(p, goal):
        with torch.no_grad():
            if stepping == "one by one":
                return gather([one_by_one(p, goal) for _ in range(TRAJECTORIES)], 0)
            env = (Points if stepping == "batched" else Separately)(goal)
            x, alive = env.reset(), np.ones(TRAJECTORIES, bool)
            seen = []
            for _ in range(HORIZON):
                mean = mean_of(p, torch.from_numpy(x))
                action = torch.normal(mean, torch.exp(p[6]).expand_as(mean)).numpy()
                after, reward, done, _ = env.step(action)
                seen.append((x, action, reward * alive, alive))
                x, alive = after, alive & ~done
        return gather(seen, 1)

    def one_by_one(p, goal):
        env = Point(goal)
        x, done, seen = env.reset(), False, []
        for _ in range(HORIZON):
            if done:  # padded
                seen.append((x, np.zeros(2), 0.0, False))
                continue
            mean = mean_of(p, torch.from_numpy(x))
            action = torch.normal(mean, torch.exp(p[6])).numpy()
            after, reward, done, _ = env.step(action)
            seen.append((x, action, reward, True))
            x = after
        return [np.stack(part) for part in zip(*seen)]

    def gather(seen, axis):
        x, action, reward, mask = (np.stack(part, axis).astype(np.float32) for part in zip(*seen))
        returns = np.zeros_like(reward)
        total = np.zeros(TRAJECTORIES)
        for t in reversed(range(HORIZON)):
            total = reward[:, t] + DISCOUNT * total
            returns[:, t] = total
        advantage = (returns - values(x, returns, mask)) * mask
        average = advantage.sum() / mask.sum()
        centred = (advantage - average) * mask
        advantage = centred / (np.sqrt((centred**2).sum() / mask.sum()) + 1e-8)
        made = (torch.from_numpy(a.astype(np.float32)) for a in (x, action, advantage, mask))
        return (*made, float(reward.sum(1).mean()))

    def adapted(p, batch):
        x, action, advantage, mask, _ = batch
        loss = -(log_prob(p, x, action) * advantage * mask).sum() / mask.sum()
        grads = torch.autograd.grad(loss, p, create_graph=True)
        return [w - LR * g for w, g in zip(p, grads)]

    params = []
    sizes = (2, *HIDDEN, 2)
    for a, b in itertools.pairwise(sizes):
        weight = torch.empty(b, a)
        torch.nn.init.xavier_uniform_(weight)
        params += [weight.requires_grad_(), torch.zeros(b, requires_grad=True)]
    params.append(torch.zeros(2, requires_grad=True))
    flat = torch.nn.utils.parameters_to_vector
    unflat = torch.nn.utils.vector_to_parameters

    def flat_grad(value, **how):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, params, **how)])

    def thinned(task):
        keep = math.ceil(curvature * TRAJECTORIES)
        before, after, (mean, log_std, logs) = task
        cut = lambda batch: (*(a[:keep] for a in batch[:4]), batch[4])  # noqa: E731
        return cut(before), cut(after), (mean[:keep], log_std, logs[:keep])

    def iterate(count=TASKS):
        tasks = []
        for _ in range(count):
            goal = random.uniform(-0.5, 0.5, 2).astype(np.float32)
            before = roll_out(params, goal)
            new = [w.detach() for w in adapted(params, before)]
            after = roll_out(new, goal)
            with torch.no_grad():
                old = mean_of(new, after[0]), new[6], log_prob(new, after[0], after[1])
            tasks.append((before, after, old))

        def judge(tasks=tasks):
            loss = kl = 0.0
            for before, (x, action, advantage, mask, _), (mean, log_std, logs) in tasks:
                new, alive = adapted(params, before), mask.sum()
                law = mean_of(new, x)
                z = (action - law) * torch.exp(-new[6])
                now = -(z**2 / 2 + new[6] + math.log(2 * math.pi) / 2).sum(-1)
                loss = loss - (torch.exp(now - logs) * advantage * mask).sum() / alive
                ratio = torch.exp(2 * (log_std - new[6]))
                moved = (mean - law) * torch.exp(-new[6])
                each = (new[6] - log_std + (ratio + moved**2 - 1) / 2).sum(-1)
                kl = kl + (each * mask).sum() / alive
            return loss / count, kl / count

        loss, kl = judge()
        gradient = flat_grad(loss, retain_graph=curvature == 1)
        if curvature < 1:
            _, kl = judge([thinned(task) for task in tasks])
        slope = flat_grad(kl, create_graph=True)

        def fisher(v, slope=slope):
            return flat_grad(slope @ v, retain_graph=True) + DAMPING * v

        x, r = torch.zeros_like(gradient), gradient.clone()
        along, squared = r.clone(), r @ r
        for _ in range(CG_STEPS):
            image = fisher(along)
            rate = squared / (along @ image)
            x, r = x + rate * along, r - rate * image
            now = r @ r
            along, squared = r + now / squared * along, now
            if squared < 1e-10:
                break
        step = torch.sqrt(2 * MAX_KL / (x @ (gradient - r) + 1e-8)) * x
        theta, before_loss = flat(params).detach(), loss.item()
        del slope, loss, kl
        for i in range(TRIES):
            unflat(theta - BACKTRACK**i * step, params)
            loss, kl = (value.item() for value in judge())
            if loss < before_loss and kl <= MAX_KL:
                break
        else:
            unflat(theta, params)
        seen.update(
            kl=kl,
            return_before=float(np.mean([task[0][4] for task in tasks])),
            return_after=float(np.mean([task[1][4] for task in tasks])),
        )

    seen = {}
    iterate(count=4)  # nothing compiles; enough to warm up
    first = time.perf_counter() - start
    measure.serve(iterate, first_seconds=first, **seen)


class Enough(Exception):
    """No more turns."""


def run_adaptax(curvature):
    measure.host_devices()
    import jax

    import adaptax as ax
    from adaptax import rl

    env = rl.Navigation()
    tasks = rl.Tasks(env, trajectories=TRAJECTORIES, horizon=HORIZON, discount=DISCOUNT)
    policy = rl.GaussianMLP(2, 2, HIDDEN, key=jax.random.key(0))
    outer = rl.TRPO(max_kl=MAX_KL, cg_steps=CG_STEPS, damping=DAMPING, curvature=curvature,
                    backtrack=BACKTRACK, max_backtracks=TRIES)  # fmt: skip
    began, cpu, warm = time.perf_counter(), time.process_time(), False

    def watch(record):
        nonlocal began, cpu, warm
        seconds = time.perf_counter() - began
        if warm:
            measure.say(seconds=seconds, cpu_seconds=time.process_time() - cpu)
        else:
            names = ("kl", "return_before", "return_after")
            measure.say(first_seconds=seconds, **{name: record[name] for name in names})
        warm = True
        if not measure.turn():
            raise Enough
        began, cpu = time.perf_counter(), time.process_time()

    try:
        ax.fit(ax.MAML(rl.log_prob, inner_lr=LR), policy, tasks, steps=1000, chunk=1,
               meta_batch=TASKS, outer=outer, key=jax.random.key(1), watch=watch)  # fmt: skip
    except Enough:
        measure.farewell()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker in ADAPTAX:
            return run_adaptax(ADAPTAX[args.worker])
        return run_torch(*TORCH[args.worker])
    results = measure.take_turns(__file__, [*TORCH, *ADAPTAX], args.repeats)
    for record in results.values():
        record["ms_per_meta_iteration"] = 1e3 * record["seconds"]
        record["steps_per_second"] = STEPS / record["seconds"]
        record["times_faster"] = {
            name: record["seconds"] / results[name]["seconds"] for name in ADAPTAX
        }
    measure.table(
        f"MAML-TRPO, 2-D navigation, policy 2-100-100-2, {TASKS} tasks, "
        f"{TRAJECTORIES} trajectories of {HORIZON}",
        ["", "steps / s", "ms / meta-iteration", *(f"{name} × faster" for name in ADAPTAX),
         "first call s", "KL", "return before", "after", "peak MB"],
        [
            (name, round(r["steps_per_second"]), r["ms_per_meta_iteration"],
             *r["times_faster"].values(), r["first_seconds"], r["kl"], r["return_before"],
             r["return_after"], round(r["peak_mb"]))
            for name, r in results.items()
        ],
    )  # fmt: skip
    if args.json:
        measure.save(args.json, results=results)


if __name__ == "__main__":
    main()

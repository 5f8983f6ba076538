"""Meta-train MAML on sinusoids and watch it adapt. `--quick` for a few seconds."""

import sys

import jax

import adaptax as ax

steps = 500 if "--quick" in sys.argv else 20_000

tasks = ax.tasks.sinusoid(shot=10, query=10)
model = ax.models.MLP(1, 1, (40, 40), key=jax.random.key(0))
learner = ax.MAML(ax.losses.mse, inner_lr=0.01, inner_steps=1, eval_steps=5)

result = ax.fit(learner, model, tasks.train, steps=steps, meta_batch=25, key=jax.random.key(1))
print(ax.evaluate(learner, result.meta, tasks.test, key=jax.random.key(2)))

# One task, by hand.
task = tasks.test.sample(jax.random.key(3))
adapted = learner.adapt(result.meta, task.support, key=jax.random.key(4))
print("loss before", ax.losses.mse(result.meta, task.query))
print("loss after", ax.losses.mse(adapted, task.query))

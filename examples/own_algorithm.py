"""A meta-learner of one's own in under thirty lines, checked and trained. `--quick` shortens."""

import sys

import jax

import adaptax as ax


class MetaSGD(ax.MetaLearner):
    """Meta-SGD (Li et al. 2017): learn an inner rate for every weight."""

    loss: ax.Loss
    inner_lr: float = 0.1

    def init(self, model, *, key):
        return {"model": model, "lr": ax.tree.full_like(model, self.inner_lr)}

    def adapt(self, meta, support, *, key):
        return ax.inner.descend(self.loss, meta["model"], support, lr=meta["lr"], steps=1, key=key)

    def meta_loss(self, meta, task, *, key, progress):
        k1, k2 = jax.random.split(key)
        model = self.adapt(meta, task.support, key=k1)
        return self.loss(model, task.query.draw(model, k2)), {}


learner = MetaSGD(ax.losses.mse, inner_lr=0.01)
ax.testing.check_learner(learner)
ax.testing.check_meta_gradient(learner)

tasks = ax.tasks.sinusoid(shot=10, query=10)
model = ax.models.MLP(1, 1, (40, 40), key=jax.random.key(0))
steps = 500 if "--quick" in sys.argv else 20_000
result = ax.fit(learner, model, tasks.train, steps=steps, meta_batch=25, key=jax.random.key(1))
print(ax.evaluate(learner, result.meta, tasks.test, key=jax.random.key(2)))

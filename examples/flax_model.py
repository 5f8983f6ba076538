"""A Flax NNX convolution model, meta-trained unchanged and at full speed. `--quick` shortens."""

import sys

import jax
from flax import nnx

import adaptax as ax


class Net(nnx.Module):
    """Three strided convolutions with batch normalisation by the batch."""

    def __init__(self, way, rngs):
        sizes = [(1, 32), (32, 32), (32, 32)]
        convs = [nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in sizes]
        norms = [nnx.BatchNorm(b, use_running_average=False, rngs=rngs) for _, b in sizes]
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.head = nnx.Linear(32, way, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


steps = 10 if "--quick" in sys.argv else 1000
tasks = ax.tasks.glyphs(way=5, shot=1, query=5)
learner = ax.MAML(ax.losses.cross_entropy, inner_lr=0.4, inner_steps=3)
result = ax.fit(
    learner, Net(5, nnx.Rngs(0)), tasks.train, steps=steps, meta_batch=8, key=jax.random.key(1)
)
report = ax.evaluate(
    learner, result.meta, tasks.test, key=jax.random.key(2), episodes=10 * min(steps, 10)
)
print(report)

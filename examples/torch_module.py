"""A PyTorch module, meta-trained here and handed back adapted. Needs `adaptax[torch]`."""

import sys

import jax

import adaptax as ax

try:
    import torch
    import torchax  # noqa: F401
except ImportError:
    sys.exit(print("this example needs PyTorch and torchax: pip install 'adaptax[torch]'"))

module = torch.nn.Sequential(
    torch.nn.Conv2d(1, 32, 3, stride=2, padding=1),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.Conv2d(32, 32, 3, stride=2, padding=1),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 7 * 7, 5),
)
steps = 10 if "--quick" in sys.argv else 1000
tasks = ax.tasks.glyphs(way=5, shot=1, query=5)
learner = ax.MAML(ax.losses.cross_entropy, inner_lr=0.1, inner_steps=3)
result = ax.fit(
    learner, ax.from_torch(module), tasks.train, steps=steps, meta_batch=8, key=jax.random.key(1)
)
report = ax.evaluate(
    learner, result.meta, tasks.test, key=jax.random.key(2), episodes=10 * min(steps, 10)
)
print(report)

task = tasks.test.sample(jax.random.key(3))
adapted = learner.adapt(result.meta, task.support, key=jax.random.key(4))
print(ax.to_torch(adapted, module).train()(torch.zeros(1, 1, 28, 28).expand(2, -1, -1, -1)).shape)

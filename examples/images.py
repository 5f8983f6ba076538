"""Five-way classification of characters no one has seen, with no download. `--quick` shortens."""

import sys

import jax

import adaptax as ax

steps, episodes = (10, 10) if "--quick" in sys.argv else (2000, 100)

tasks = ax.tasks.glyphs(way=5, shot=1, query=5)  # or ax.tasks.omniglot(way=5, shot=1, query=5)
model = ax.models.Conv4(out=5, key=jax.random.key(0), head_init="glorot")
learners = {
    "MAML": ax.MAML(ax.losses.cross_entropy, inner_lr=2.0, inner_steps=1, eval_steps=3),
    "Reptile": ax.Reptile(
        ax.losses.cross_entropy,
        inner_optimizer=ax.inner.adam(1e-3),
        inner_batch=10,
        eval_steps=20,
        include_query=True,
    ),
}
for name, learner in learners.items():
    result = ax.fit(
        learner, model, tasks.train, steps=steps, meta_batch=8, key=jax.random.key(1),
        validate=tasks.val, validation={"episodes": episodes},
    )  # fmt: skip
    for transductive in (True, False):
        report = ax.evaluate(
            learner, result.meta, tasks.test, key=jax.random.key(2), episodes=episodes,
            transductive=transductive,
        )  # fmt: skip
        print(f"{name}, transductive {transductive}:", report, sep="\n", end="\n\n")

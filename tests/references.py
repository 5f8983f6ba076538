"""What the meta-gradients of our learners are the exact gradients of, where they stop some.

Each is a function of the meta-parameters with the value of the meta-loss, in which what the learner
stops is computed from `at`; `None` for learners that stop nothing, whose meta-loss it is itself.
Where that is easy they are written out, apart from the learner's own inner loop.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import adaptax as ax
from adaptax import rl, svgd, testing, tree
from adaptax.algorithms.maml_plus_plus import multi_step_weights


def check_meta_gradient(learner, *args, progress=1.0, **how):
    """The public check, given what the learner stops."""
    reference = of(learner, progress)
    testing.check_meta_gradient(learner, *args, progress=progress, reference=reference, **how)


def of(learner, progress=1.0):
    """The reference of a learner at this point of meta-training, or `None`."""
    match learner:
        case ax.MAML(first_order=True):
            return fomaml(learner)
        case ax.MetaSGD(first_order=True):
            return first_order_meta_sgd(learner)
        case ax.Reptile():
            return reptile(learner)
        case ax.MAMLPlusPlus():
            return maml_plus_plus(learner, progress)
        case ax.PLATIPUS(first_order=True):
            return first_order_platipus(learner)
        case ax.BayesianMAML():
            return bmaml(learner)
        case ax.MAMLEnsemble(first_order=True):
            return emaml(learner)
        case ax.LEO():
            return leo(learner)
    return None


def slope(loss, model, batch, chosen):
    """The gradient with respect to the chosen leaves."""
    params, rest = eqx.partition(model, chosen)
    return jax.grad(lambda p: loss(eqx.combine(p, rest), batch))(params)


def moved(model, rates, grads):
    """`θ − α ∘ g`, for one rate or a tree of them."""
    one = isinstance(rates, int | float) or eqx.is_array(rates)
    scale = (lambda g: -rates * g) if one else (lambda g, r: -r * g)
    return eqx.apply_updates(model, jax.tree.map(scale, grads, *([] if one else [rates])))


def fomaml(learner):
    """`L_Q(U_k(at) + θ − at)`."""

    def reference(meta, task, *, at, key, progress):
        adapt_key, query_key = jax.random.split(key)
        model = learner.course(at, task.support, key=adapt_key, steps=learner.inner_steps)
        model = tree.shift(model, meta, at)
        return learner.loss(model, task.query.draw(model, query_key))

    return reference


def emaml(learner):
    """The sum of the members' references."""

    def reference(meta, task, *, at, key, progress):
        one = lambda model, there: fomaml(learner._maml)(
            model, task, at=there, key=key, progress=progress
        )
        return jnp.sum(meta.map(one, at.models))

    return reference


def first_order_meta_sgd(learner):
    """`L_Q(θ − α ∘ Σ_j g_j)`, the inner gradients from `at`."""

    def reference(meta, task, *, at, key, progress):
        chosen = tree.adaptable(at["model"], learner.adapt_only)
        here, there = meta["model"], at["model"]
        for _ in range(learner.inner_steps):
            g = slope(learner.loss, there, task.support, chosen)
            here = moved(here, eqx.filter(meta["lr"], chosen), g)
            there = moved(there, eqx.filter(at["lr"], chosen), g)
        return learner.loss(here, task.query)

    return reference


def reptile(learner):
    """`½‖θ − φ‖²`, φ from `at`, and the same of a carried state."""

    def reference(meta, task, *, at, key, progress):
        goal, state = learner._goal(at, task, key)
        if not learner.carry_state:
            return tree.squared_distance(meta, goal) / 2
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), state)
        distance = tree.squared_distance(meta["state"], state)
        return (tree.squared_distance(meta["model"], goal) + distance) / 2

    return reference


def maml_plus_plus(learner, progress):
    """In first order the inner gradients from `at`; of running statistics their own updates."""
    end = learner._ends[int(learner._phase(progress))]
    first_order = end <= learner.derivative_order_annealing
    if not first_order and learner.per_step_batch_norm_statistics is None:
        return None
    steps = learner.inner_steps
    if end <= learner.multi_step_loss and learner.inner_steps > 1:
        weights = multi_step_weights(steps, progress / learner.multi_step_loss)
    else:
        weights = jnp.eye(steps)[-1]

    def first(meta, at, task):
        names, total = learner._adapted(at), 0.0
        here, there = meta["model"], at["model"]
        rate = lambda m, path, j: m["rates"][path][j] if "rates" in m else learner.inner_lr
        step = lambda model, m, g, j: tree.replace(
            model, {path: leaf - rate(m, path, j) * g[path] for path, leaf in picked(model).items()}
        )
        picked = lambda model: {path: tree.by_path(model)[path] for path in names}
        for j in range(steps):
            seen = learner._at(at, there, j)
            loss = lambda leaves, seen=seen: learner.loss(tree.replace(seen, leaves), task.support)
            g = jax.grad(loss)(picked(seen))
            here, there = step(here, meta, g, j), step(there, at, g, j)
            total += weights[j] * learner.loss(learner._at(meta, here, j), task.query)
        return total

    def reference(meta, task, *, at, key, progress):
        whole = lambda meta: learner.meta_loss(meta, task, key=key, progress=progress)[0]
        value = first(meta, at, task) if first_order else whole(meta)
        if not at.get("norm_statistics"):
            return value
        # The loss does not depend on them, and their derivative is by how much passes move them.
        update = eqx.filter_grad(whole)(at)["norm_statistics"]
        away = jax.tree.map(jnp.subtract, meta["norm_statistics"], at["norm_statistics"])
        return value + sum(jnp.sum(away[path] * update[path]) for path in away)

    return reference


def first_order_platipus(learner):
    """Every gradient inside the meta-loss from `at`."""

    def reference(meta, task, *, at, key, progress):
        _, _, noise_key, _, query_key = jax.random.split(key, 5)
        chosen = tree.adaptable(at["mean"], learner.adapt_only)

        def means(rate, source):
            here, there = meta["mean"], at["mean"]
            for _ in range(learner.conditioning_steps):
                g = slope(learner.loss, there, source, chosen)
                here, there = moved(here, meta[rate], g), moved(there, at[rate], g)
            return here, there

        noise = tree.noise_like(noise_key, meta["log_inference_variance"])
        inferred, from_at = means("inference_lr", task.query)

        def sample(mean, m):
            std = jax.tree.map(lambda s: jnp.exp(s / 2), m["log_inference_variance"])
            return eqx.apply_updates(mean, jax.tree.map(jnp.multiply, std, noise))

        here, there = sample(inferred, meta), sample(from_at, at)
        for _ in range(learner.inner_steps):
            g = slope(learner.loss, there, task.support, chosen)
            here, there = moved(here, learner.inner_lr, g), moved(there, learner.inner_lr, g)
        loss, kl = learner.loss(here, task.query.draw(here, query_key)), 0.0
        prior, _ = means("prior_lr", task.support)
        parts = [
            jax.tree.leaves(eqx.filter(part, chosen))
            for part in (
                inferred,
                meta["log_inference_variance"],
                prior,
                meta["log_prior_variance"],
            )
        ]
        for q, q_log, p, p_log in zip(*parts, strict=True):
            ratio = jnp.exp(q_log - p_log)
            kl += jnp.sum(ratio - 1 - (q_log - p_log) + (q - p) ** 2 * jnp.exp(-p_log)) / 2
        weight = learner.kl_weight
        return loss + (weight(progress) if callable(weight) else weight) * kl

    return reference


def bmaml(learner):
    """The leader from `at`; in first order the gradients of the log-posterior as well."""
    if learner.objective == "bfa" and not learner.first_order:
        return None

    def chase(here, there, support):
        """SVGD of both, by the gradients at `there`."""
        kernel = learner.kernel
        for _ in range(learner.inner_steps):
            loss = lambda each, there=there: learner._posterior(
                ax.Ensemble(eqx.combine(each, there.models), there.shared), support
            )
            g = jax.grad(loss)(tree.parameters(there.models))
            step = lambda one, g=g: ax.Ensemble(
                moved(one.models, learner.inner_lr,
                      svgd.descent(tree.parameters(one.models), g, kernel)), one.shared
            )  # fmt: skip
            here, there = step(here), step(there)
        return here, there

    def reference(meta, task, *, at, key, progress):
        leader_key = jax.random.split(key, 3)[2]
        if learner.first_order:
            here, there = chase(meta, at, task.support)
        else:
            how = {"key": key, "steps": learner.inner_steps}
            here, there = (learner.course(m, task.support, **how) for m in (meta, at))
        if learner.objective == "bfa":
            losses = here.map(lambda model: learner.loss(model, task.query))
            return jnp.log(len(losses)) - jax.nn.logsumexp(-losses)
        union = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), task.support, task.query)
        leader = learner.course(there, union, key=leader_key, steps=learner._leader_steps)
        return learner._distance(here, leader)

    return reference


def leo(learner):
    """The adapted code of the encoder's penalty from `at`."""

    def reference(meta, task, *, at, key, progress):
        value, metrics = learner.meta_loss(meta, task, key=key, progress=progress)
        here, there = (learner._course(m, task.support, key, learner.steps) for m in (meta, at))
        penalty = jnp.mean((there.latent.model - here.start) ** 2)
        return value + learner.encoder_penalty * (penalty - metrics["encoder_penalty"])

    return reference


def policies(learner):
    """Of `adaptax.rl.BayesianMAML`: leaders, or for Reptile the goals, from `at`."""
    assert isinstance(learner, rl.BayesianMAML)

    def reference(meta, task, *, at, key, progress=1.0):
        adapt_key, query_key = jax.random.split(key)
        if learner.objective == "policy-gradient":
            return learner.meta_loss(meta, task, key=key)[0]
        adapted, goals = (learner.adapt(m, task.support, key=adapt_key) for m in (meta, at))
        if learner.objective == "reptile":
            return distance(meta, goals)
        leaders = learner.course(goals, task.query, key=query_key, steps=learner.leader_steps)
        return distance(adapted, leaders)

    return reference


def distance(x, y):
    """`Σ_m ‖x^m − y^m‖`."""
    return jnp.sum(jnp.sqrt(x.map(tree.squared_distance, y.models)))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from adaptax.tasks import Circles, DataError, circles

KEY = jax.random.key(5)
KEYS = jax.random.split(KEY, 4000)


def test_the_support_is_positives_inside_the_circle():
    tasks = circles(shot=20).train
    assert isinstance(tasks, Circles)
    support = jax.vmap(tasks.sample)(KEYS[:500]).support
    assert support.x.shape == (500, 20, 2)
    assert support.y.dtype == jnp.int32
    assert (support.y == 1).all()
    centre, radius = jax.vmap(tasks.parameters)(KEYS[:500])
    far = jnp.linalg.norm(support.x - centre[:, None], axis=-1) / radius[:, None]
    assert float(far.max()) < 1 + 1e-4
    # Uniform in area: the squared distance is uniform, and so is the direction.
    assert kstest(np.asarray(far**2).ravel(), "uniform").pvalue > 1e-4
    east, north = jnp.moveaxis(support.x - centre[:, None], -1, 0)
    angle = jnp.arctan2(north, east)
    assert kstest(np.asarray(angle).ravel(), "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-4


def test_queries_are_labelled_by_the_circle_and_uniform_in_the_square():
    tasks = circles(query=30).test
    query = jax.vmap(tasks.sample)(KEYS).query
    centre, radius = jax.vmap(tasks.parameters)(KEYS)
    far = np.linalg.norm(np.asarray(query.x - centre[:, None]), axis=-1)
    margin = far - np.asarray(radius)[:, None]
    clear = np.abs(margin) > 1e-5
    assert (np.asarray(query.y) == (margin < 0))[clear].all()
    for axis in (0, 1):
        assert kstest(np.asarray(query.x[:, 0, axis]), "uniform", (0, 5)).pvalue > 1e-4
    # E[π d²/4] / 25 = 0.0441; the standard error over 4000 circles is below 0.001.
    assert abs(float(query.y.mean()) - 0.0441) < 0.005


def test_laws_of_centre_and_diameter():
    centre, radius = jax.vmap(circles().train.parameters)(KEYS)
    assert kstest(np.asarray(2 * radius), "uniform", (0.1, 1.9)).pvalue > 1e-4
    for axis in (0, 1):
        assert kstest(np.asarray(centre[:, axis]), "uniform", (1, 3)).pvalue > 1e-4


def test_a_key_names_one_task_and_the_function_labels_its_queries():
    tasks = circles(diameter=[2.0, 2.0], centre=[2.0, 3.0]).train
    task = tasks.sample(KEY)
    assert jnp.array_equal(task.query.y, tasks.function(KEY)(task.query.x))
    assert jnp.array_equal(task.query.x, tasks.sample(KEY).query.x)
    assert set(np.asarray(task.query.y)) == {0, 1}
    assert float(tasks.parameters(KEY)[1]) == 1
    described = tasks.describe()
    assert (described["shot"], described["query"], described["way"]) == (10, 50, 2)
    assert described["support"] == "positives only"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shot": 0}, "shot=0"),
        ({"query": -1}, "query=-1"),
        ({"diameter": (-1.0, 1.0)}, r"diameter=\(-1.0, 1.0\); expected .* at least 0"),
        ({"centre": (4.0, 1.0)}, "centre="),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        circles(**arguments)

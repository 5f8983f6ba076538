import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Decoded images of all tests of this room, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def real_data():
    root = Path(os.environ.get("ADAPTAX_DATA") or SHARED)
    if not root.is_dir():
        pytest.skip(f"no real data: ADAPTAX_DATA is not set and {SHARED} does not exist")
    return root


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A data root without data and a network that fails."""

    def fail(*args, **kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("pooch.retrieve", fail)
    return tmp_path


@pytest.fixture
def labelled():
    """Bytes in which an image tells its class and row: 30 classes of 12 + (class mod 5) images."""
    labels = np.concatenate([np.full(12 + c % 5, c) for c in range(30)])
    x = np.zeros((len(labels), 4, 4, 1), np.uint8)
    x[:, 0, 0, 0] = labels
    x[:, 1, 2, 0] = np.arange(len(labels)) % 256
    x[:, 3, 1, 0] = np.arange(len(labels)) // 256
    return x, labels

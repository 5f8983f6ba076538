import warnings
import zlib

import numpy as np
import pytest

from adaptax.tasks import from_arrays
from adaptax.tasks.content import row_checksums, warn_of_shared

ROWS = {"train": np.arange(4), "val": np.arange(4, 6), "test": np.arange(6, 9)}


def images(kind=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (9, 3, 3, 1)).astype(kind)


def test_checksums_are_of_rows():
    x = images()
    assert row_checksums(x).tolist() == [zlib.crc32(image.tobytes()) for image in x]
    assert np.array_equal(row_checksums(x[:, :, ::-1]), row_checksums(x[:, :, ::-1].copy()))


def test_every_pair_of_splits_is_compared():
    x = images()
    x[5] = x[1]
    x[[6, 8]] = x[2]
    x[7] = x[4]
    message = (
        "two splits of set: 1 of val are in train, 2 of test are in train, 1 of test are in val"
    )
    with pytest.warns(UserWarning, match=f"{message}, such as row 1 and row 5"):
        warn_of_shared(x, row_checksums(x), ROWS, name="set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x[[6, 7, 8]] = images()[6:]
        warn_of_shared(x, row_checksums(x), ROWS, name="set", shared=[("train", "val")])


def test_checksums_that_agree_by_chance_are_not_enough():
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shared(x, np.zeros(9, np.uint32), ROWS, name="set")
    x[8] = x[3]
    with pytest.warns(UserWarning, match="1 of test are in train, such as d and i"):
        warn_of_shared(x, np.zeros(9, np.uint32), ROWS, name="set", names="abcdefghi")


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_arrays_of_pictures_are_compared(kind):
    x = images(kind)
    x[8] = x[0]
    given = {split: (x[rows], rows) for split, rows in ROWS.items()}
    asked = {"way": 1, "shot": 1, "query": 0}
    with pytest.warns(UserWarning, match="the same picture is in two splits of arrays: 1 of test"):
        from_arrays(given, **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_arrays(given, **asked, memory_budget=0)  # too large to be read for this
        warnings.filterwarnings("ignore", "the same picture is in two splits")
        from_arrays(given, **asked)

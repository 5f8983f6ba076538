import sys
import unicodedata

import equinox as eqx
import jax
import numpy as np
import pytest

from adaptax.tasks import DataError, glyphs
from adaptax.tasks.cache import cache_root
from adaptax.tasks.glyphs import load, split_of

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def drawn():
    images, splits = load()
    return images.images, splits


def test_about_two_thousand_characters(drawn):
    _, splits = drawn
    sizes = [len(splits[split]) for split in ("train", "val", "test")]
    assert sizes[0] > 1200
    assert min(sizes[1:]) > 180
    assert all(len(rows) >= 8 for classes in splits.values() for rows in classes.values())


def test_no_image_occurs_twice_nor_is_blank(drawn):
    array, splits = drawn
    rows = np.concatenate([r for classes in splits.values() for r in classes.values()])
    assert len({array[row].tobytes() for row in rows}) == len(rows)
    assert array[rows].any((1, 2, 3)).all()


def test_splits_are_scripts_and_lookalikes_are_one_class(drawn):
    _, splits = drawn
    chars = {split: {chr(int(name[2:], 16)) for name in splits[split]} for split in splits}
    assert {unicodedata.name(c).split()[0] for c in chars["val"]} == {"GREEK"}
    assert {unicodedata.name(c).split()[0] for c in chars["test"]} == {
        "ARMENIAN",
        "GEORGIAN",
        "LAO",
    }
    assert set("Aaあ0+→") & chars["train"] == set("Aa0+→")
    everything = set.union(*chars.values())
    assert not set("ΑΒΕАВЕΤϜ") & everything  # Greek and Cyrillic that look Latin
    assert set("ΔΩλЖя") <= everything


@pytest.mark.parametrize("character", ["\u0301", " ", "\ue000", "⠿", "║", "²", "ℝ", "ª"])
def test_left_out(character):
    assert split_of(character) is None


def test_episodes():
    splits = glyphs(way=5, shot=1, query=5)
    task = eqx.filter_jit(splits.train.sample)(KEY)
    assert task.query.x.shape == (25, 28, 28, 1)
    assert 0.02 < float(task.query.x.mean()) < 0.3
    with pytest.raises(DataError, match="has 8 examples, but shot \\+ query = 5 \\+ 5"):
        glyphs(shot=5)


def test_what_is_kept_is_what_was_drawn(drawn, monkeypatch):
    """In memory, on the disk, and where the file on the disk is broken."""
    module = sys.modules["adaptax.tasks.glyphs"]
    assert load()[1] is drawn[1]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_drawn", None)
        module._load.cache_clear()
        again = load()
    (table,) = cache_root().glob("glyphs-*.json")
    whole = table.read_text()
    for broken in ("", "{}", "[[], {}]", whole[:-9], whole.replace("[[", "[[[", 1)):
        table.write_text(broken)
        assert module._read_table(table) is None
    table.write_text(whole)
    assert np.array_equal(again[0].images, drawn[0])
    assert {s: list(of) for s, of in again[1].items()} == {
        s: list(of) for s, of in drawn[1].items()
    }
    for split, classes in drawn[1].items():
        assert all(np.array_equal(rows, again[1][split][c]) for c, rows in classes.items())


def test_without_fonts(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="holds 0 of the DejaVu and STIX fonts"):
        load()

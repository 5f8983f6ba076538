"""Compiled programs are kept between starts of the command line."""

import os
import subprocess
import sys

import pytest

from adaptax import caches


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTAX_CACHE", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("JAX_COMP", "JAX_PERSISTENT"))]:
        monkeypatch.delenv(name)
    return tmp_path


def test_the_folder_is_that_of_the_caches(elsewhere):
    assert caches.folder("decoded") == elsewhere
    assert caches.folder("programs") == elsewhere / "programs"


def test_the_second_start_finds_the_programs_of_the_first(elsewhere):
    words = [sys.executable, "-m", "adaptax", "train", "maml", "sinusoid", "--steps", "4",
             "--meta-batch", "2", "--episodes", "4", "--run"]  # fmt: skip
    kept = []
    for run in ("a", "b"):
        every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = {**os.environ, **every}
        subprocess.run([*words, run], cwd=elsewhere, env=environment, check=True)
        (programs,) = (elsewhere / "programs").iterdir()
        kept.append({file.name for file in programs.glob("*-cache")})
    assert kept[0]
    assert kept[1] == kept[0], "the second start compiled"
    metrics = [(elsewhere / run / "checkpoint.safetensors").read_bytes() for run in ("a", "b")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("given", ["", "/some/where"])
def test_jaxs_own_variable_comes_first(elsewhere, monkeypatch, given):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    caches.keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == given
    assert not (elsewhere / "programs").exists()


def test_where_nothing_can_be_written_programs_are_compiled(elsewhere, monkeypatch):
    (elsewhere / "programs").write_text("a file")
    caches.keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ

"""Random command lines on broken files: each is to end with exit 0, 2 or 130, and in sentences.

    python tests/fuzz_command_line.py --cases 3000 --log fuzz.log

A process that has imported the package, but started no backend, forks one child for each case; the
child has a folder of its own, with small runs, images and archives of which some are broken, and
calls the command line there. A finding is another exit code, a traceback, a fault that the command
line itself reports, more than 20 seconds, or a change outside the folder. Case N of a seed is
always the same: `--only N` runs it alone, and shows what it prints.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

SECONDS = 20
MEMORY = 6 * 2**30
ALGORITHMS = ["maml", "fomaml", "anil", "meta-sgd", "maml++", "reptile", "platipus", "bmaml",
              "emaml", "leo", "pretrained", "class-mean", "ridge"]  # fmt: skip
FAMILIES = ["sinusoid", "omniglot", "folder", "sinusoid_or_line", "circles", "fsmol", "embeddings",
            "navigation", "bandit"]  # fmt: skip
SHORT = ["--steps", "2", "--episodes", "2", "--meta-batch", "2"]
IMAGES = ["--path", "images", "--way", "2", "--query", "1", "--set", "task.image_size=8", "--set",
          "task.channels=1", "--set", "network.mlp=[4]", "--set", "network.in_size=64"]  # fmt: skip
TRAINED = {
    "runs/sine": ["train", "maml", "sinusoid", *SHORT, "--set", "network.mlp=[4]"],
    "runs/images": ["train", "maml", "folder", *SHORT, *IMAGES],
    "runs/extractor": ["pretrain", "folder", "--path", "images", "--size", "16", "--width", "2",
                       "--epochs", "1", "--batch", "4"],
}  # fmt: skip
NASTY_WORDS = ["", "-1", "0", "1", "2", "-0", "x", "1e9", "nan", "inf", "2147483648", "9" * 20,
               "9" * 5000, "[/b]", "a[/b]", "$x$", "é", "\x1b[2J", "\udcff", "a" * 300, "../x",
               "/dev/null", ".", "nowhere", "--", "-h", "--help", "--json", "--set", "{}", "[",
               "*", "**/*", "runs/sine", "images", "images.zip", "~nobody"]  # fmt: skip
NASTY_JSON = [None, True, False, -1, 0, 1, 3, 2.5, -0.5, 1e300, float("nan"), float("inf"), 2**31,
              2**63, -(2**40), 10**400, "x", "", "\0", "a[/b]", "é\ud800", "9" * 5000, [], [1],
              [[]], ["x"], [-1], [0], [None] * 1000, {}, {"a": 1}, {"mlp": [2]}]  # fmt: skip
SECTIONS = ["task", "test_task", "network", "learner", "outer", "evaluation", "training", "x"]
KEYS = ["way", "shot", "query", "path", "image_size", "splits", "seed", "mlp", "conv4", "linear",
        "policy", "in_size", "activation", "batch_norm", "init", "context", "inner_lr", "loss",
        "inner_steps", "eval_steps", "adapt_only", "inner_adam", "meta_gradient", "noise",
        "reduction", "samples", "particles", "adam", "sgd", "clip", "trpo", "ppo", "at", "episodes",
        "select", "steps", "transductive", "mapping", "y"]  # fmt: skip


def commands(rng: random.Random) -> list[str]:
    """A command line that would do, before it is changed."""
    run = rng.choice(["runs/sine", "runs/images"])
    algorithm = rng.choice(ALGORITHMS)
    return rng.choice(
        [
            ["train", algorithm, "sinusoid", *SHORT, "--set", "network.mlp=[4]", "--run", "new"],
            ["train", algorithm, "folder", *SHORT, *IMAGES, "--run", "new"],
            ["train", algorithm, rng.choice(FAMILIES), *SHORT, "--run", "new"],
            ["train", "maml", "embeddings", "--path", "embeddings.safetensors", "--way", "2",
             "--query", "1", *SHORT, "--run", "new"],
            ["train", "--resume", run],
            ["train", "platipus", "sinusoid", "--init-from", "runs/sine", *SHORT, "--run", "new"],
            ["evaluate", run, "--episodes", "2", "--json"],
            ["evaluate", run, "--episodes", "2", "--steps", "1", "--split", "val"],
            ["predict", "runs/images", "--support", "support", "--query", "images/c0/0.png",
             "--out", "out.csv"],
            ["predict", "runs/images", "--support", "support", "--query", "images/c1", "*/*/1.png"],
            ["compare", "sinusoid", "--algorithms", "maml", "--steps", "2", "--episodes", "2",
             "--out", "new"],
            ["analyze", "active", run, "--labels", "1", "--pool", "2", "--episodes", "2", "--out",
             "new"],
            ["analyze", "taylor", "sinusoid", "--count", "x", "--minibatches", "2", "--out", "new"],
            [*TRAINED["runs/extractor"], "--run", "new"],
            ["embed", "runs/extractor", "--out", "new.safetensors"],
            ["embed", "--archive", "leo.zip", "--out", "new.safetensors"],
            ["recipes", "show", rng.choice(["maml-sinusoid", "leo-mini_imagenet-5w1s", "x"])],
            ["recipes", "list"],
            ["recipes", "run", "maml-omniglot-5w1s", "--data-root", "images", "--run", "new"],
            ["ablate", "omniglot", "--data-root", "images", "--out", "new"],
        ]
    )  # fmt: skip


def changed_words(rng: random.Random, words: list[str]) -> list[str]:
    """The words with one changed, left out, doubled, or put in."""
    words, at = list(words), rng.randrange(len(words) + 1)
    match rng.randrange(6):
        case 0:
            words[at:at] = [rng.choice(NASTY_WORDS)]
        case 1 | 2:
            words[at : at + 1] = [rng.choice(NASTY_WORDS)]
        case 3:
            del words[at : at + 1]
        case 4:
            words += words[at : at + 2]
        case _:
            value = rng.choice(NASTY_JSON)
            text = rng.choice([json.dumps(value), str(value), "[" * 3000])
            words += ["--set", f"{rng.choice(SECTIONS)}.{rng.choice(KEYS)}={text}"]
    return words


def changed_json(rng: random.Random, value: object) -> object:
    """A JSON value with one of its parts changed, left out, or put in."""
    value = copy.deepcopy(value)
    parents = [value]
    for one in parents:
        parents += [v for v in (one.values() if isinstance(one, dict) else one)
                    if isinstance(v, dict | list)]  # fmt: skip
    one = rng.choice([p for p in parents if p] or parents)
    if isinstance(one, list):
        one[rng.randrange(len(one)) :][:1] = [rng.choice(NASTY_JSON)]
        one[:] = [*one, rng.choice(NASTY_JSON)] if rng.random() < 0.5 else one[1:]
    else:
        key = rng.choice([*one, rng.choice(KEYS)])
        if rng.random() < 0.25:
            one.pop(key, None)
        else:
            one[key] = rng.choice(NASTY_JSON)
    return value


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with some changed, cut off, doubled, or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at:]
            case 2:
                del data[at : at + rng.randrange(1, 20)]
            case 3:
                data[at:at] = data[at : at + rng.randrange(1, 200)]
            case _:
                data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), rng.randbytes(8)])
    return bytes(data)


def changed_file(rng: random.Random, file: Path) -> None:
    """A file that is broken: its content, or what it is at all."""
    if file.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        with contextlib.suppress(ValueError, RecursionError):  # broken before
            text = file.read_text()
            lines = text.splitlines() if file.suffix == ".jsonl" else [text]
            at = rng.randrange(len(lines))
            deep = "[" * 5000 if rng.random() < 0.05 else None
            lines[at] = deep or json.dumps(changed_json(rng, json.loads(lines[at])))
            file.write_text("\n".join(lines) + "\n")
            return
    match rng.randrange(10):
        case 0:
            file.unlink()
        case 1:
            file.unlink()
            file.mkdir()
        case 2:
            file.unlink()
            file.symlink_to(rng.choice([file.name, "/dev/null", "../..", "nowhere"]))
        case 3:
            file.write_bytes(rng.choice([b"", b"{", b"\xff\xfe", b"[]", b"%!PS\nquit\n"]))
        case _:
            file.write_bytes(changed_bytes(rng, file.read_bytes()))


READERS = {
    "runs/sine": [["evaluate", "runs/sine", "--episodes", "2"], ["train", "--resume", "runs/sine"],
                  ["analyze", "active", "runs/sine", "--labels", "1", "--pool", "2", "--episodes",
                   "2", "--out", "new"],
                  ["train", "platipus", "sinusoid", "--init-from", "runs/sine", *SHORT]],
    "runs/images": [["evaluate", "runs/images", "--episodes", "2"],
                    ["train", "--resume", "runs/images"],
                    ["predict", "runs/images", "--support", "support", "--query", "images/c1"]],
    "runs/extractor": [["embed", "runs/extractor"], ["pretrain", "--resume", "runs/extractor"]],
    "images.zip": [["train", "maml", "folder", "--path", "images.zip", *SHORT, *IMAGES[2:]]],
    "images": [["train", "maml", "folder", *SHORT, *IMAGES],
               ["pretrain", "folder", "--path", "images", "--size", "16", "--width", "2",
                "--epochs", "1", "--batch", "4"]],
    "support": [["predict", "runs/images", "--support", "support", "--query", "images/c1"]],
    "embeddings.safetensors": [["train", "maml", "embeddings", "--path", "embeddings.safetensors",
                                "--way", "2", "--query", "1", *SHORT]],
    "leo.zip": [["embed", "--archive", "leo.zip", "--out", "new.safetensors"]],
}  # fmt: skip
"""What is read, and who reads it."""


def arranged(rng: random.Random, folder: Path) -> list[str]:
    """Break something in a folder; returns the command line to try there."""
    if rng.random() < 0.4:
        words = commands(rng)
        for _ in range(rng.choice([1, 1, 2, 3])):
            words = changed_words(rng, words)
        return [word for word in words if "\0" not in word]
    what = rng.choice([*READERS, "runs/sine", "runs/images"])
    target = folder / what
    files = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
    likely = [f for f in files if f.suffix in (".json", ".jsonl", ".safetensors")]
    for _ in range(rng.choice([1, 1, 2])):
        file = rng.choice(likely if likely and rng.random() < 0.8 else files)
        if file.is_file() and not file.is_symlink():
            changed_file(rng, file)
    return rng.choice(READERS[what])


def prepare(top: Path) -> None:
    """Small data and runs, of which every case gets a copy."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for where, classes in (("images", 12), ("support", 2)):
        for c in range(classes):
            for i in range(3):
                file = top / where / f"c{c}" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(file)
    with zipfile.ZipFile(top / "images.zip", "w") as archive:
        for file in sorted((top / "images").rglob("*.png")):
            archive.write(file, file.relative_to(top))
    with zipfile.ZipFile(top / "leo.zip", "w") as archive:
        for split in ("train", "val", "test"):
            keys = [f"{i}-n{split}{i // 3}-n{i}.JPEG" for i in range(9)]
            held = {"embeddings": rng.normal(size=(9, 4)).astype("f4"), "keys": np.array(keys, "S"),
                    "labels": np.arange(9) // 3}  # fmt: skip
            name = f"embeddings/miniImageNet/center/{split}_embeddings.pkl"
            archive.writestr(name, pickle.dumps(held, 2))
    for run, words in TRAINED.items():
        code, _, _ = within(top, [*words, "--run", run])
        assert code == 0, (top / ".err").read_text()
    code, _, _ = within(top, ["embed", "runs/extractor", "--out", "embeddings.safetensors"])
    assert code == 0, (top / ".err").read_text()
    # Compiled once: the seconds of a case are to be its own.
    within(top, ["train", "platipus", "sinusoid", "--init-from", "runs/sine", *SHORT, "--run", "w"])
    shutil.rmtree(top / "w", ignore_errors=True)


def within(
    folder: Path, words: list[str], seconds: float = 9 * SECONDS
) -> tuple[int, float, float]:
    """The command line in a folder: its exit code (minus a signal), processor and wall seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(folder)
            for handle, name, flags in ((0, "/dev/null", os.O_RDONLY), (1, ".out", None),
                                        (2, ".err", None)):  # fmt: skip
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if flags is None else flags
                os.dup2(os.open(name, flags), handle)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
            os.environ |= {"HOME": str(folder), "TMPDIR": str(folder),
                           "ADAPTAX_CACHE": str(folder / ".cache")}  # fmt: skip
            tempfile.tempdir = None
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
            sys.argv = ["adaptax", *words]
            from adaptax.cli import main

            code = main(words)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            code = 99
        os._exit(code)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        wall = time.monotonic() - began
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, wall
        if wall > seconds:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def outside(top: Path, but: Path) -> dict[str, tuple[float, int]]:
    """What is in a folder, but for a part of it."""
    return {
        str(path): (path.lstat().st_mtime, path.lstat().st_size)
        for path in top.rglob("*")
        if but not in (path, *path.parents) and path != but.parent
    }


def wrong(code: int, cpu: float, wall: float, out: str, err: str) -> str | None:
    """What there is to say against the end of a case; `None` if nothing."""
    # Where the machine is busy, the wall's time says little.
    if cpu > SECONDS or (wall > 2 * SECONDS and cpu < wall / 10):
        return f"{cpu:.0f} s of processor, {wall:.0f} s"
    if code not in (0, 2, 130):
        return f"exit {code} after {cpu:.0f} s of processor, {wall:.0f} s"
    if "Traceback (most recent call last)" in out + err:
        return "traceback"
    if "fault of adaptax" in err:
        return "fault"
    lines = err.splitlines()
    if code == 2 and not (lines and lines[-1].startswith("adaptax: error: ")):
        return "no sentence"
    if any(not line.startswith(("adaptax: ", "Downloading data")) for line in lines):
        return "other text on stderr"
    return None


def main() -> int:
    """Run the cases; the exit code says whether there were findings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--log", type=Path, help="a JSON line for every finding")
    asked = parser.parse_args()
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    with tempfile.TemporaryDirectory(prefix="adaptax-fuzz-") as name:
        top = Path(name).resolve()
        usual = {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "OPENBLAS_NUM_THREADS": "1",
                 "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "http://127.0.0.1:9",
                 "MPLCONFIGDIR": str(top / "matplotlib"),
                 "JAX_COMPILATION_CACHE_DIR": str(top / "programs"),
                 "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "200",
                 "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}  # fmt: skip
        os.environ |= {**usual, "XLA_FLAGS": flags}
        os.environ.pop("ADAPTAX_DATA", None)
        return campaign(asked, top)


def campaign(asked: argparse.Namespace, top: Path) -> int:
    """The cases, one after another."""
    import tensorboardX  # noqa: F401
    from jax._src import xla_bridge
    from PIL import Image

    from adaptax.cli import cookbook, extractor, inspection, studies, training  # noqa: F401

    Image.init()
    assert not xla_bridge._backends, "a backend that has begun does not survive a fork"
    base, watched = top / "base", top / "watched"
    base.mkdir()
    prepare(base)
    watched.mkdir()
    (watched / "sentinel").write_text("nobody's")
    case = watched / "folder" / "case"
    counts: collections.Counter[str] = collections.Counter()
    findings, began = 0, time.monotonic()
    numbers = range(asked.first, asked.first + asked.cases)
    for number in [asked.only] if asked.only is not None else numbers:
        rng = random.Random(f"{asked.seed} {number}")
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(base, case, symlinks=True)
        words = arranged(rng, case)
        before = outside(watched, case)
        code, cpu, wall = within(case, words)
        out, err = ((case / name).read_text(errors="replace") for name in (".out", ".err"))
        bad = wrong(code, cpu, wall, out, err)
        if outside(watched, case) != before and not any("../" in word for word in words):
            bad = "a change outside its folder"
        counts[f"exit {code}"] += 1
        findings += bad is not None
        if bad or asked.only is not None:
            found = {"case": number, "seed": asked.seed, "finding": bad, "words": words,
                     "stderr": err[-3000:], "stdout": out[-300:]}  # fmt: skip
            print(json.dumps(found), flush=True)
            if asked.log is not None:
                with asked.log.open("a") as log:
                    log.write(json.dumps(found) + "\n")
            for file in case.glob("adaptax-*.log"):
                print(file.read_text()[-3000:], flush=True)
    spent = time.monotonic() - began
    print(f"{sum(counts.values())} cases in {spent:.0f} s, {dict(counts)}, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())

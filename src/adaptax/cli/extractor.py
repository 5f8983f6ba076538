"""Feature extractors: `adaptax pretrain` and `adaptax embed`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from .. import models, report, tasks
from ..engine.augment import Augmentation
from ..engine.extract import extract, pixels_of
from ..engine.fingerprint import fingerprint
from ..engine.pretrain import Pretraining, check_train, restore, step_count
from ..engine.pretrain import pretrain as train_classifier
from ..engine.run import Run, differences
from ..process import Interrupted
from ..recipes import schema
from ..recipes.runs import nothing_half_written
from ..task import Model, Splits
from ..tasks.bank import NAMES
from ..tasks.embedding_archive import read_archive
from ..tasks.embeddings import write
from ..tasks.files import DataError
from .console import consoles, free_folder, save_figure
from .facts import dump, facts, keep
from .pretraining import BACKBONES, DATA, Embed, Pretrain
from .progress import scoring, watching

VERSION = 1
"""Of config.json."""

_CHARACTERS = ("omniglot", "glyphs")
_TRAINING = ("epochs", "batch", "rate", "momentum", "weight_decay", "label_smoothing", "held_out",
             "validate_every", "precision")  # fmt: skip


def pretrain(asked: Pretrain) -> None:
    """`adaptax pretrain`."""
    if asked.resume is not None:
        path, config = _resumed(asked)
    else:
        config = _config(asked)
        path = (
            Path(asked.run) if asked.run else free_folder(f"pretrain-{asked.backbone}-{asked.data}")
        )
    out, console = consoles()
    result = _train(config, path, console=console)
    seconds = sum(record["seconds"] for record in result.history)
    curve = [report.learning_curve(result.history)] if result.history else []
    summary: dict[str, Any] = {
        "run": str(path),
        "accuracy": result.accuracy,
        "command": config["command"],
        **facts(),
        "training": {"steps": result.step, "seconds": seconds, "stopped": result.stopped},
        "config": config,
        "plots": [str(save_figure(figure, path / "learning_curve.png")) for figure in curve],
    }
    keep(path / "pretrained.json", summary)
    if asked.json:
        print(dump(summary))
        return
    if result.accuracy is not None:
        out.print(f"accuracy on held-out images of the train classes: "
                  f"{report.number('accuracy', result.accuracy)}", soft_wrap=True)  # fmt: skip
    out.print(f"trained {result.step:,} steps in {seconds:.0f} s", soft_wrap=True)
    out.print(f"run folder: {path}; extract its features with: adaptax embed {path}",
              soft_wrap=True)  # fmt: skip


def embed(asked: Embed) -> None:
    """`adaptax embed`."""
    if (asked.run is None) == (asked.archive is None):
        raise ValueError("embed wants the folder of a run, or --archive, one of them")
    if asked.archive is not None:
        if asked.out is None:
            raise ValueError("--archive wants --out, the file to write")
        found = read_archive(asked.archive, asked.view)
        backbone, path = "wrn28-10", Path(asked.out)
        source: dict[str, Any] = {"archive": Path(asked.archive).name, "view": asked.view}
    else:
        path = Path(asked.out) if asked.out else Path(asked.run or "") / "embeddings.safetensors"
        found, backbone, source = _extracted(asked)
    write(path, found, backbone=backbone, source=source)
    summary = {
        "file": str(path), "backbone": backbone, "width": found["train"][0].shape[1],
        "splits": {split: {"embeddings": len(x), "classes": len(names)}
                   for split, (x, _, names) in found.items()},
        "source": source,
    }  # fmt: skip
    if asked.json:
        print(dump(summary))
        return
    counts = ", ".join(f"{split} {len(x):,} of {len(names)} classes"
                       for split, (x, _, names) in found.items())  # fmt: skip
    consoles()[0].print(f"{path}: embeddings of width {summary['width']}, {counts}", soft_wrap=True)


def load(path: str | Path) -> tuple[Model, int, dict[str, Any]]:
    """A run's network, the step it is from, and the run's configuration.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if its files are broken, or not those of pretraining.
    """
    run = Run(path)
    config = _pretraining(run)
    model, step = restore(run, _network(config, len(config["classes"])))
    return model, step, config


def splits_of(config: Mapping[str, Any]) -> Splits:
    """The images of a run."""
    make: Any = _families()[config["data"]]
    root = {} if config["data_root"] is None else {"data_root": config["data_root"]}
    return make(way=1, shot=1, query=0, **root, **config["task"])


def _families() -> dict[str, Callable[..., Splits]]:
    return {"mini_imagenet": tasks.mini_imagenet, "omniglot": tasks.omniglot,
            "glyphs": tasks.glyphs, "folder": tasks.folder}  # fmt: skip


def check_unseen(classes: list[str], splits: Splits) -> None:
    """Refuse validation and test classes that an extractor was trained on.

    Raises:
        DataError: naming some.
    """
    for tasks_ in (splits.val, splits.test):
        seen = sorted(set(classes) & set(tasks_.classes))  # type: ignore[attr-defined]
        if seen:
            raise DataError(
                f"{len(seen)} of the {tasks_.split} classes ({', '.join(seen[:3])}, …) are among "
                "those that the network is trained on; few-shot scores on them would mean nothing, "
                "so split the data otherwise"
            )


def _train(config: dict[str, Any], path: Path, *, console: Any) -> Pretraining:
    splits, how = splits_of(config), config["training"]
    images = check_train(splits.train)
    check_unseen(list(images.classes), splits)
    pixels = pixels_of(images, np.zeros(1, int)).shape[1:]
    config |= {"classes": list(images.classes), "image": list(pixels)}
    run = Run(path)
    if run.checkpoint_file.exists():
        _check_same(run, config)
    steps = step_count(images, how["epochs"], how["batch"], how["held_out"])
    with nothing_half_written(run), run, watching(
        f"{config['backbone']} on {config['data']}", steps, console
    ) as watch:  # fmt: skip
        network = _network(config, len(images.classes))
        if run.checkpoint_file.exists():
            watch.start(max((record["step"] for record in run.metrics()), default=0))
        else:
            run.write_config(config)
        result = train_classifier(
            network,
            images,
            key=jax.random.key(config["seed"]),
            augmentation=Augmentation(**config["augmentation"]),
            run=run,
            resume="auto",
            watch=watch,
            **how,
        )
    if result.stopped == "interrupted":
        go_on = shlex.join(["adaptax", "pretrain", "--resume", str(path)])
        raise Interrupted(
            f"interrupted, and saved in {path}; go on with: {go_on} "
            f"(step {result.step:,} of {steps:,})"
        )
    return result


def _check_same(run: Run, config: dict[str, Any]) -> None:
    """Raise if the folder holds a run with other settings; where the data lie is none."""
    free = ("command", "data_root")
    was, now = ({k: v for k, v in c.items() if k not in free} for c in (run.config(), config))
    if changed := differences(fingerprint(**was), fingerprint(**now)):
        raise ValueError(
            f"{run.path} already holds a run, with other settings ({changed}); choose another "
            "folder"
        )


def _config(asked: Pretrain) -> dict[str, Any]:
    """The content of config.json, but for what the data tell."""
    if asked.data is None:
        raise ValueError(f"pretrain wants the data: {', '.join(DATA)}; or --resume RUN")
    task: dict[str, Any] = {} if asked.size is None else {"image_size": asked.size}
    if asked.data == "glyphs" and asked.size is not None:
        raise ValueError("glyphs are of 28×28 pixels; leave out --size")
    if (asked.data == "folder") != (asked.path is not None):
        raise ValueError("--path names the images of the data set folder, and of no other")
    if asked.path is not None:
        task["path"] = os.path.realpath(Path(asked.path).expanduser())
    characters = asked.data in _CHARACTERS
    side = asked.size or (28 if characters else 84)
    crop, jitter = (2, 0.0) if characters else (side // 10, 0.4)
    augmentation: dict[str, Any] = {
        "crop": crop if asked.crop is None else asked.crop,
        "flip": not characters,
        "jitter": jitter if asked.jitter is None else asked.jitter,
    }
    Augmentation(**augmentation)  # complains now, not after the data are read
    root = None if asked.data_root is None else os.path.realpath(Path(asked.data_root).expanduser())
    return {
        "version": VERSION,
        "command": shlex.join(["adaptax", *sys.argv[1:]]),
        "kind": "pretraining",
        "data": asked.data,
        "data_root": root,
        "task": task,
        "backbone": asked.backbone,
        "network": _network_arguments(asked),
        "augmentation": augmentation if asked.augment else {},
        "training": {name: getattr(asked, name) for name in _TRAINING},
        "seed": asked.seed,
    }


def _network_arguments(asked: Pretrain) -> dict[str, Any]:
    if asked.backbone != "wrn28-10" and asked.depth is not None:
        raise ValueError(f"--depth is of wrn28-10; {asked.backbone} has one depth")
    if asked.backbone == "conv4":
        return {"filters": asked.width or 64, "down": asked.down}
    if asked.backbone == "resnet12":
        first = asked.width or 64
        return {"widths": [first, first * 5 // 2, first * 5, first * 10]}
    return {"width": asked.width or 10, "depth": asked.depth or 28}


def _network(config: Mapping[str, Any], out: int) -> Model:
    """The network of a configuration, as its seed initialises it."""
    network, image = dict(config["network"]), tuple(config["image"])
    key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
    if config["backbone"] == "conv4":
        down: Any = {"pool": "pool-relu", "stride": "stride"}[network.pop("down")]
        return models.Conv4(
            out, key=key, image=image, down=down, head="flatten", head_init="glorot", scale=True,
            **network,
        )  # fmt: skip
    if config["backbone"] == "resnet12":
        return models.ResNet12(out, key=key, channels=image[2], widths=tuple(network["widths"]))
    return models.WideResNet(out, key=key, channels=image[2], **network)


def _pretraining(run: Run) -> dict[str, Any]:
    config = run.config()
    wanted = {"data", "task", "network", "training", "classes", "image"}
    sound = isinstance(config, dict) and config.get("kind") == "pretraining"
    if not sound or not wanted <= config.keys() or config.get("backbone") not in BACKBONES:
        raise ValueError(
            f"{run.path / 'config.json'} is not of a pretraining; expected a folder that "
            "`adaptax pretrain` wrote"
        )
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(f"{run.path / 'config.json'}: {error}") from None
    return config


def _check(config: dict[str, Any]) -> None:
    """Raise unless everything in a configuration is of the kind that `_config` writes."""
    kinds: dict[str, Any] = {
        "data": Literal[DATA], "data_root": str | None, "seed": int, "command": str,
        "classes": Sequence[str], "image": tuple[int, int, int],
    }  # fmt: skip
    for name, kind in kinds.items():
        low, high = (-(2**31), 2**32 - 1) if name == "seed" else (1, schema.MOST)
        schema.fitting(name, config.get(name), kind, least=low, most=high)
    own: dict[str, Any] = {
        "conv4": {"filters": int, "down": Literal["pool", "stride"]},
        "resnet12": {"widths": tuple[int, int, int, int]},
        "wrn28-10": {"width": int, "depth": int},
    }
    network = {name: (kind, None) for name, kind in own[config["backbone"]].items()}
    training = schema.taken(train_classifier)
    sections = {
        "network": (network, network),
        "training": ({name: training[name] for name in _TRAINING}, _TRAINING),
        "task": (schema.taken(_families()[config["data"]], ("way", "shot", "query")), ()),
        "augmentation": (schema.taken(Augmentation), ()),
    }
    for section, (known, needed) in sections.items():
        found = schema.checked(section, config.get(section), known)
        for name in needed:
            if name not in found:
                raise ValueError(f"{section}.{name} is missing")


def _resumed(asked: Pretrain) -> tuple[Path, dict[str, Any]]:
    for field in dataclasses.fields(Pretrain):
        if field.name not in ("resume", "data_root", "json") and (
            getattr(asked, field.name) != field.default
        ):
            raise ValueError(
                "a run goes on with its own settings; leave out "
                f"--{field.name.replace('_', '-')}, or start a new run"
            )
    path = Path(asked.resume or "")
    config = _pretraining(Run(path))
    return path, config if asked.data_root is None else {**config, "data_root": asked.data_root}


def _extracted(asked: Embed) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Features, labels and class names of every split, the backbone and the source."""
    model, step, config = load(asked.run or "")
    if asked.layer is not None and not isinstance(model, models.WideResNet):
        raise ValueError(f"--layer is of wrn28-10, and the run is of {config['backbone']}")
    if asked.data_root is not None:
        config = {**config, "data_root": asked.data_root}
    splits = splits_of(config)
    check_unseen(config["classes"], splits)
    found = {}
    for split in NAMES:
        images: Any = getattr(splits, split)
        count = np.asarray(images.count)
        with scoring(split, int(count.sum()), consoles()[1], unit="images") as watch:
            x = extract(model, images, batch=asked.batch, layer=asked.layer, watch=watch)
        found[split] = (x, np.repeat(np.arange(len(count)), count), list(images.classes))
    source = {
        "run": str(asked.run), "step": step, "data": config["data"], "task": config["task"],
        "network": config["network"], "layer": asked.layer, "trained_on": config["classes"],
        "command": config["command"],
    }  # fmt: skip
    return found, config["backbone"], source

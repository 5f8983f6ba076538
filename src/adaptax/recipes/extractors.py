"""Feature extractors in folders: classifiers of the meta-train classes, and their features."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from .. import models, tasks
from ..engine.augment import Augmentation
from ..engine.extract import extract, pixels_of
from ..engine.fingerprint import fingerprint
from ..engine.pretrain import Pretraining, check_train, restore, step_count
from ..engine.pretrain import pretrain as train_classifier
from ..engine.run import Run, differences
from ..process import ended
from ..task import Model, Splits
from ..tasks.bank import NAMES
from ..tasks.embedding_archive import read_archive
from ..tasks.embeddings import write
from ..tasks.files import DataError
from ..text import MOST
from . import schema
from .runs import Progress, Silent, nothing_half_written

VERSION = 1
"""Of config.json."""

FAMILIES: dict[str, Callable[..., Splits]] = {
    "mini_imagenet": tasks.mini_imagenet,
    "omniglot": tasks.omniglot,
    "glyphs": tasks.glyphs,
    "folder": tasks.folder,
}
"""The data that a classifier can be trained on."""

NETWORKS: dict[str, dict[str, Any]] = {
    "conv4": {"filters": int, "down": Literal["pool", "stride"]},
    "resnet12": {"widths": tuple[int, int, int, int]},
    "wrn28-10": {"width": int, "depth": int},
}
"""The settings of each backbone."""

TRAINING = ("epochs", "batch", "rate", "momentum", "weight_decay", "label_smoothing", "held_out",
            "validate_every", "precision")  # fmt: skip
"""Arguments of `adaptax.pretrain` that a run has."""


def extractor_config(
    data: str,
    *,
    backbone: str = "conv4",
    size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    down: str = "pool",
    augment: bool = True,
    crop: int | None = None,
    jitter: float | None = None,
    seed: int = 0,
    data_root: str | None = None,
    path: str | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Return the content of config.json, but for what the data tell.

    Args:
        data: a name in `FAMILIES`.
        backbone: a name in `NETWORKS`.
        size: side of the images in pixels; 84 if `None`, 28 of characters.
        width: filters of conv4 or of the first block of resnet12, or the widening of wrn28-10.
        depth: layers of wrn28-10.
        down: how a block of conv4 halves the image, `"pool"` or `"stride"`.
        augment: change the images at random.
        crop: pixels to shift by at most; a tenth of the side if `None`, 2 of characters.
        jitter: of brightness, contrast and saturation; 0.4 if `None`, 0 of characters.
        seed: names all randomness.
        data_root: folder of the data sets.
        path: the images of the data `folder`.
        training: arguments of `adaptax.pretrain`, named in `TRAINING`.

    Raises:
        ValueError: for settings that the data or the backbone do not have.
    """
    task: dict[str, Any] = {} if size is None else {"image_size": size}
    if data == "glyphs" and size is not None:
        raise ValueError("glyphs are of 28×28 pixels; leave out --size")
    if (data == "folder") != (path is not None):
        raise ValueError("--path names the images of the data set folder, and of no other")
    if path is not None:
        task["path"] = os.path.realpath(Path(path).expanduser())
    if backbone != "wrn28-10" and depth is not None:
        raise ValueError(f"--depth is of wrn28-10; {backbone} has one depth")
    characters = data in ("omniglot", "glyphs")
    side = size or (28 if characters else 84)
    usual_crop, usual_jitter = (2, 0.0) if characters else (side // 10, 0.4)
    augmentation: dict[str, Any] = {
        "crop": usual_crop if crop is None else crop,
        "flip": not characters,
        "jitter": usual_jitter if jitter is None else jitter,
    }
    Augmentation(**augmentation)  # complains now, not after the data are read
    first = width or 64
    network = {
        "conv4": {"filters": first, "down": down},
        "resnet12": {"widths": [first, first * 5 // 2, first * 5, first * 10]},
        "wrn28-10": {"width": width or 10, "depth": depth or 28},
    }[backbone]
    return {
        "version": VERSION,
        "command": shlex.join(["adaptax", *sys.argv[1:]]),
        "kind": "pretraining",
        "data": data,
        "data_root": None if data_root is None else os.path.realpath(Path(data_root).expanduser()),
        "task": task,
        "backbone": backbone,
        "network": network,
        "augmentation": augmentation if augment else {},
        "training": {name: training[name] for name in TRAINING},
        "seed": seed,
    }


def fit_extractor(
    config: Mapping[str, Any], path: Path, progress: Progress | None = None
) -> tuple[Pretraining, dict[str, Any]]:
    """Train a classifier in a folder, or resume its training.

    Args:
        config: see `extractor_config`.
        path: the run folder.
        progress: shows it; nothing if `None`.

    Returns:
        The training, and its configuration with what the data told.

    Raises:
        Interrupted: on Ctrl-C, or in time, with the command that goes on.
        ValueError: if the folder holds a run with other settings.
    """
    splits, how = splits_of(config), config["training"]
    images = check_train(splits.train)
    check_unseen(list(images.classes), splits)
    pixels = pixels_of(images, np.zeros(1, int)).shape[1:]
    config = {**config, "classes": list(images.classes), "image": list(pixels)}
    run = Run(path)
    if run.checkpoint_file.exists():
        _check_same(run, config)
    steps = step_count(images, how["epochs"], how["batch"], how["held_out"])
    shown = (progress or Silent()).training(f"{config['backbone']} on {config['data']}", steps)
    with nothing_half_written(run), run, shown as watch:
        network = make_network(config, len(images.classes))
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
    if result.stopped != "done":
        go_on = shlex.join(["adaptax", "pretrain", "--resume", str(path)])
        done = f"(step {result.step:,} of {steps:,})"
        kept = f"and saved in {path}; go on with: {go_on} {done}"
        raise ended(result.stopped == "out of time", kept)
    return result, config


def load_extractor(path: str | Path) -> tuple[Model, int, dict[str, Any]]:
    """Load a run's network, the step it is from, and the run's configuration.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if its files are broken, or not those of pretraining.
    """
    run = Run(path)
    config = extractor_config_in(run)
    model, step = restore(run, make_network(config, len(config["classes"])))
    return model, step, config


def embed_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    batch: int = 256,
    layer: int | None = None,
    data_root: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the features of every image that a run knows of to a file.

    Args:
        run: folder of the run.
        out: the file; `embeddings.safetensors` in the folder if `None`.
        batch: images at once.
        layer: of wrn28-10: the convolution to take features after.
        data_root: folder of the data sets, if not the one that the run was trained from.
        progress: shows it; nothing if `None`.

    Returns:
        What was written, as JSON values.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: for a layer of another network.
        DataError: if the network was trained on classes of validation or test.
    """
    model, step, config = load_extractor(run)
    if layer is not None and not isinstance(model, models.WideResNet):
        raise ValueError(f"--layer is of wrn28-10, and the run is of {config['backbone']}")
    splits = splits_of(config if data_root is None else {**config, "data_root": data_root})
    check_unseen(config["classes"], splits)
    found = {}
    for split in NAMES:
        images: Any = getattr(splits, split)
        count = np.asarray(images.count)
        with (progress or Silent()).scoring(f"{split} images", int(count.sum())) as watch:
            x = extract(model, images, batch=batch, layer=layer, watch=watch)
        found[split] = (x, np.repeat(np.arange(len(count)), count), list(images.classes))
    own = {name: config[name] for name in ("data", "task", "network", "command")}
    source = {
        "run": str(run), "step": step, "layer": layer, "trained_on": config["classes"], **own
    }  # fmt: skip
    file = Path(run) / "embeddings.safetensors" if out is None else Path(out)
    return _written(file, found, config["backbone"], source)


def embed_archive(archive: str | Path, out: str | Path, view: str) -> dict[str, Any]:
    """Write the embeddings that LEO's authors released to a file.

    Args:
        archive: theirs, or the folder it was unpacked to.
        out: the file.
        view: which embeddings of the archive.

    Returns:
        What was written, as JSON values.
    """
    source = {"archive": Path(archive).name, "view": view}
    return _written(Path(out), read_archive(archive, view), "wrn28-10", source)


def _written(
    file: Path, found: Mapping[str, Any], backbone: str, source: dict[str, Any]
) -> dict[str, Any]:
    write(file, found, backbone=backbone, source=source)
    return {
        "file": str(file), "backbone": backbone, "width": found["train"][0].shape[1],
        "splits": {split: {"embeddings": len(x), "classes": len(names)}
                   for split, (x, _, names) in found.items()},
        "source": source,
    }  # fmt: skip


def splits_of(config: Mapping[str, Any]) -> Splits:
    """Return the images of a run."""
    root = {} if config["data_root"] is None else {"data_root": config["data_root"]}
    return FAMILIES[config["data"]](way=1, shot=1, query=0, **root, **config["task"])


def check_unseen(classes: list[str], splits: Splits) -> None:
    """Raise if an extractor was trained on classes of validation or test.

    Raises:
        DataError: naming some.
    """
    for split in (splits.val, splits.test):
        seen = sorted(set(classes) & set(split.classes))  # type: ignore[attr-defined]
        if seen:
            raise DataError(
                f"{len(seen)} of the {split.split} classes ({', '.join(seen[:3])}, …) are among "
                "those that the network is trained on; few-shot scores on them would mean nothing, "
                "so split the data otherwise"
            )


def make_network(config: Mapping[str, Any], out: int) -> Model:
    """Return the network of a configuration, as its seed initialises it."""
    network, image = dict(config["network"]), tuple(config["image"])
    key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
    if config["backbone"] == "conv4":
        down: Any = {"pool": "pool-relu", "stride": "stride"}[network.pop("down")]
        how: dict[str, Any] = {"head": "flatten", "head_init": "glorot", "scale": True, **network}
        return models.Conv4(out, key=key, image=image, down=down, **how)
    if config["backbone"] == "resnet12":
        return models.ResNet12(out, key=key, channels=image[2], widths=tuple(network["widths"]))
    return models.WideResNet(out, key=key, channels=image[2], **network)


def extractor_config_in(run: Run) -> dict[str, Any]:
    """Return the configuration of a run.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it is not one of pretraining, or a setting is not of its kind.
    """
    config = run.config()
    wanted = {"data", "task", "network", "training", "classes", "image"}
    sound = isinstance(config, dict) and config.get("kind") == "pretraining"
    if not sound or not wanted <= config.keys() or config.get("backbone") not in NETWORKS:
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
    """Raise unless everything in a configuration is of the kind that `extractor_config` writes."""
    kinds: dict[str, Any] = {
        "data": Literal[tuple(FAMILIES)], "data_root": str | None, "seed": int, "command": str,
        "classes": Sequence[str], "image": tuple[int, int, int],
    }  # fmt: skip
    for name, kind in kinds.items():
        low, high = (-(2**31), 2**32 - 1) if name == "seed" else (1, MOST)
        schema.fitting(name, config.get(name), kind, least=low, most=high)
    network = {name: (kind, None) for name, kind in NETWORKS[config["backbone"]].items()}
    training = schema.taken(train_classifier)
    sections = {
        "network": (network, network),
        "training": ({name: training[name] for name in TRAINING}, TRAINING),
        "task": (schema.taken(FAMILIES[config["data"]], ("way", "shot", "query")), ()),
        "augmentation": (schema.taken(Augmentation), ()),
    }
    for section, (known, needed) in sections.items():
        found = schema.checked(section, config.get(section), known)
        for name in needed:
            if name not in found:
                raise ValueError(f"{section}.{name} is missing")


def _check_same(run: Run, config: Mapping[str, Any]) -> None:
    """Raise if the folder holds a run with other settings; where the data lie is none."""
    free = ("command", "data_root")
    was, now = ({k: v for k, v in c.items() if k not in free} for c in (run.config(), config))
    if changed := differences(fingerprint(**was), fingerprint(**now)):
        raise ValueError(
            f"{run.path} already holds a run, with other settings ({changed}); choose another "
            "folder"
        )

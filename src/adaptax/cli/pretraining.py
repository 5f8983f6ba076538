"""What can be asked of feature extractors on the command line; `extractor.py` does it.

Nothing here imports JAX, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from .options import Flag, Number, OwnCount, OwnFloat, OwnInt, Seed, Size, Word, one

BACKBONES = ("conv4", "resnet12", "wrn28-10")
DATA = ("mini_imagenet", "omniglot", "glyphs", "folder")
_NONE = arg(help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a classifier of the meta-train classes, whose features `adaptax embed` extracts.

    Classes of validation and test are never seen; the validation accuracy is of images held out of
    the meta-train classes. Writes a run folder: configuration, metrics, checkpoint, the result and
    its curve. Ctrl-C saves, and says how to go on.

    DATA is mini_imagenet, omniglot, glyphs (drawn from Matplotlib's fonts, no download) or folder
    (your images, a class a directory).

    For example:
      adaptax pretrain mini_imagenet --backbone conv4 --size 42 --epochs 20
      adaptax pretrain mini_imagenet --backbone resnet12 --epochs 90 --label-smoothing 0.1
      adaptax pretrain --resume runs/pretrain-conv4-mini_imagenet
    """

    data: Positional[Annotated[str | None, one(str, "DATA", "a data set", DATA), _NONE]] = None
    """what to train on"""
    backbone: Literal["conv4", "resnet12", "wrn28-10"] = "conv4"
    """the network: conv4 suits a CPU, the others an accelerator"""
    size: OwnCount = None
    """side of the images in pixels, to which they are scaled (84; 28 of characters)"""
    width: OwnCount = None
    """filters of conv4 (64) or of the first block of resnet12 (64); widening of wrn28-10 (10)"""
    depth: OwnCount = None
    """layers of wrn28-10 (28)"""
    down: Literal["pool", "stride"] = "pool"
    """how a block of conv4 halves the image; strides are 3 to 4 times as fast"""
    epochs: Size = 60
    """passes over the images"""
    batch: Size = 64
    """images a step"""
    rate: Number = 0.1
    """step size at the start, from where it follows half a cosine to zero"""
    momentum: Number = 0.9
    """of the steps, as Nesterov's"""
    weight_decay: Number = 5e-4
    """of kernels and matrices"""
    label_smoothing: Number = 0.0
    """share of the target that is spread over all classes"""
    augment: bool = True
    """change the images at random: shifts, and mirror images and light but for characters"""
    crop: OwnInt = None
    """shift by so many pixels at most (a tenth of the side; 2 of characters)"""
    jitter: OwnFloat = None
    """change brightness, contrast and saturation by this share at most (0.4; 0 of characters)"""
    held_out: Number = 0.1
    """share of the images of each class that are kept for validation"""
    validate_every: Size = 1
    """epochs between validations"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the convolutions of resnet12 and wrn28-10; auto is bfloat16 on accelerators"""
    seed: Seed = 0
    """names all randomness"""
    data_root: Word = None
    """folder of the data sets, else ADAPTAX_DATA, else the user's cache"""
    path: Word = None
    """the images of the data set `folder`, a class a directory"""
    run: Word = None
    """folder to write, else runs/pretrain-BACKBONE-DATA"""
    resume: Word = None
    """go on with the run in this folder, with its own settings"""
    json: Flag = False
    """print the result as JSON"""

    def __call__(self) -> None:
        """Run it."""
        from .extractor import pretrain

        pretrain(self)


@dataclasses.dataclass(frozen=True)
class Embed:
    """Extract the features of every image of all splits, each divided by its length, to a file.

    The file is for the task family `embeddings`. RUN is the folder of `adaptax pretrain`. Instead
    of a run, --archive reads the embeddings that LEO's authors released
    (storage.googleapis.com/leo-embeddings/embeddings.zip), which are pickles, without running
    anything in them.

    For example:
      adaptax embed runs/pretrain-conv4-mini_imagenet
      adaptax embed --archive embeddings.zip --out leo.safetensors
    """

    run: Positional[Annotated[str | None, one(str, "RUN", "a folder"), _NONE]] = None
    """folder of the run"""
    out: Word = None
    """file to write, else RUN/embeddings.safetensors"""
    batch: Size = 256
    """images at once"""
    layer: OwnInt = None
    """of wrn28-10: the convolution to take features after; LEO's took 21"""
    data_root: Word = None
    """folder of the data sets, if not the one that the run was trained from"""
    archive: Word = None
    """read LEO's released archive instead, or the folder it was unpacked to"""
    view: str = "miniImageNet/center"
    """which embeddings of the archive: also miniImageNet/multiview and tieredImageNet/center"""
    json: Flag = False
    """print what was written as JSON"""

    def __call__(self) -> None:
        """Run it."""
        from .extractor import embed

        embed(self)

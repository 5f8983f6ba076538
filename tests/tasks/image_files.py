import zipfile

import numpy as np
from PIL import Image


def write_images(root, classes, each, mode="RGB", size=10):
    """Noise images `root/class/i.png`."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            shape = (size, size, 3) if mode == "RGB" else (size, size)
            noise = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")


def zip_folder(folder, archive):
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder.parent))

"""The data of the figures, by torchvision's own downloads, as fashion-mnist.npz and cifar10.npz.

python benchmarks/paper/fetch.py [FOLDER]     # ~/.cache/autoslim-data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import numpy as np
from torchvision import datasets


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in (("fashion-mnist", datasets.FashionMNIST), ("cifar10", datasets.CIFAR10)):
        train, test = (source(folder, train=part, download=True) for part in (True, False))
        np.savez(
            folder / f"{name}.npz",
            x_train=np.asarray(train.data),
            y_train=np.asarray(train.targets, dtype=np.int64),
            x_test=np.asarray(test.data),
            y_test=np.asarray(test.targets, dtype=np.int64),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=common.DATA, help="where they are kept")
    main(parser.parse_args().folder)

"""Labelled images from any source, and batches of them, augmented and normalised.

`load_data` reads every source into the same three parts: train, a hold-out cut from it that judges subnets during the
search, and test, which is for the last figure only. Small sets are decoded once and held in memory as uint8, large
ones are streamed. Everything random depends on a seed and never on a global generator.
"""

from autoslim.data.arrays import EMBEDDED as EMBEDDED
from autoslim.data.augment import parse_augment as parse_augment
from autoslim.data.batches import Batches as Batches
from autoslim.data.load import MEMORY_GB as MEMORY_GB
from autoslim.data.load import load_data as load_data
from autoslim.data.loading import usual_workers as usual_workers
from autoslim.data.loading import worker_ended as worker_ended
from autoslim.data.mixing import parse_mix as parse_mix
from autoslim.data.pixels import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from autoslim.data.sets import ImageData as ImageData
from autoslim.data.sets import ImageSet as ImageSet
from autoslim.data.sets import StreamedSet as StreamedSet

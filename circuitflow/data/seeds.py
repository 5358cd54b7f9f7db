"""Random generators, one for each purpose."""

import zlib

import numpy as np


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator that depends on the seed and on what it is for, so that one more draw elsewhere changes nothing."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])

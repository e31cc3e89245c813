"""Type aliases for the NumPy arrays that the packages exchange."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]  # features, vectors, scores
Pixels = NDArray[np.uint8]  # decoded images, (3, S, S) or (n, 3, S, S)
TokenIds = NDArray[np.int64]  # (n, L)
Rows = NDArray[np.int64]  # row numbers of an index
Mask = NDArray[np.bool_]  # one truth value for each row
# vectors in blocks (m, E); each call starts from the beginning
Blocks = Callable[[], Iterator[Floats]]

"""What input and output tensors have in common."""

from struct import Struct
from typing import NamedTuple

LENGTH = Struct("<I")  # before each element of a BYTES tensor
NO_SHARED_MEMORY = "Shared memory is not supported; send the data with the request."


class TensorSpec(NamedTuple):
    """An input or output of a model; the first dimension is -1, any number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]

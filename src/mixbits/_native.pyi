from typing import Any

import numpy as np
from numpy.typing import NDArray

def pack_bits(codes: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None: ...
def unpack_bits(packed: NDArray[np.uint8], bits: int, codes: NDArray[np.uint8]) -> None: ...

class Conv:
    c: int
    o: int
    groups: int
    kh: int
    kw: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    out_h: int
    out_w: int
    in_h: int
    in_w: int
    pixel_stride: int
    a_max: int
    a_scale: int
    a_offset: int
    a_zero: int
    w_bits: int
    w_min: int
    w_max: int
    w_step: int

def kernels() -> list[tuple[str, bool, str]]: ...
def refuses(name: str, conv: Conv) -> str: ...
def kernel_cost(name: str, conv: Conv) -> tuple[float, int, int]: ...
def convolve(
    name: str,
    conv: Conv,
    input: NDArray[np.uint8],
    levels: NDArray[np.int16],
    sums: NDArray[np.int32],
    rows: int,
    channels: int,
) -> None: ...
def time_kernel(
    name: str,
    conv: Conv,
    input: NDArray[np.uint8],
    levels: NDArray[np.int16],
    rows: int,
    channels: int,
    repeats: int,
) -> list[float]: ...
def weight_bytes(name: str, conv: Conv) -> int: ...
def ceilings() -> list[str]: ...
def time_ceiling(name: str, repeats: int) -> float: ...
def isa_problem() -> str: ...
def cpu_model() -> str: ...

class Tensor:
    def __init__(
        self,
        array: NDArray[np.float32] | NDArray[np.uint8],
        *,
        scale: int = 1,
        offset: int = 0,
        step: float = 1.0,
        lowest: int = 0,
    ) -> None: ...

class Operation:
    def __init__(self, name: str, attributes: dict[str, Any]) -> None: ...
    def __call__(self, inputs: list[Tensor], output: Tensor, parts: int = 1) -> None: ...

def operation_names() -> list[str]: ...

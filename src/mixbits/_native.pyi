from enum import Enum
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

class Block(Enum):
    arena = 0
    input = 1
    output = 2
    constants = 3

class Place:
    def __init__(self, block: Block, offset: int) -> None: ...
    @property
    def block(self) -> Block: ...
    @property
    def offset(self) -> int: ...

class PixelPlace:
    def __init__(self, place: Place, image: int, row: int, pixel: int) -> None: ...

class Border:
    place: Place
    images: int
    rows: int
    columns: int
    pixel: int
    top: int
    bottom: int
    left: int
    right: int
    value: int
    channels: int

class Rounding:
    finite: bool
    @property
    def divide(self) -> bool: ...

def uniform_rounding(step: float, level_min: int, spacing: int, last: int, byte_step: int) -> Rounding: ...
def codebook_rounding(step: float, thresholds: NDArray[np.float32], bytes: NDArray[np.uint8]) -> Rounding: ...

class Step:
    borders: list[Border]

class LayerStep(Step):
    conv: Conv
    images: int
    input: Place
    input_image: int
    def pad(self, border_level: int, pad_y: int, pad_x: int, size_y: int, size_x: int) -> None: ...
    def add_bytes(self, to: PixelPlace, scale: int, offset: int, step: float) -> None: ...
    def add_floats(self, to: PixelPlace, finite: bool) -> None: ...
    def limit(self, low: float, high: float) -> None: ...
    def give_floats(self, to: PixelPlace) -> None: ...
    def give_bytes(self, to: PixelPlace, rounding: Rounding) -> None: ...
    def needs(self, kernel: str) -> tuple[int, int]: ...
    def use(
        self,
        kernel: str,
        levels: NDArray[np.int16],
        scale: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> None: ...

class Operand:
    def __init__(
        self,
        place: Place,
        bytes: bool,
        shape: list[int],
        strides: list[int],
        scale: int,
        offset: int,
        step: float,
        lowest: int,
    ) -> None: ...

class RoundStep(Step):
    def __init__(self, source: Operand, to: Operand, rounding: Rounding) -> None: ...

class CopyStep(Step):
    def __init__(self, source: Operand, to: Operand) -> None: ...

class FillStep(Step): ...

class OperationStep(Step):
    def __init__(self, operation: Operation, inputs: list[Operand], output: Operand) -> None: ...
    def needs(self) -> tuple[int, int]: ...

class Engine:
    def __init__(
        self, arena: int, constants: NDArray[np.uint8], sample_in: int, sample_out: int, threads: int
    ) -> None: ...
    def add(self, step: Step) -> None: ...
    def run(self, input: NDArray[np.float32], output: NDArray[np.float32], samples: int) -> int: ...
    def time(self, input: NDArray[np.float32], samples: int, repeats: int) -> list[float]: ...
    def allocated(self) -> tuple[int, int, int]: ...
    def __len__(self) -> int: ...

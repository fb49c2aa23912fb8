"""Compile the Triton kernels to GPU machine code, without a GPU: the interpreter accepts code that compilers refuse.

usage: python gpu_code.py [COMPUTE CAPABILITY]

The program calls the op as a user would, but compiles each kernel for its arguments instead of launching it. It prints
each kernel's name and the size of its machine code.
"""

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from cases import Case, run
from torch import Tensor, bfloat16
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from multifire import ops
from multifire.ops import triton_kernels as kernels

CASES = [
    Case(4, 64, add_after=True, dtype=bfloat16),
    Case(1, 3, 1, layout="contiguous", add_before=True),
    Case(9, 17, 5, add_before=True, add_after=True, state=True, surrogate="atan"),
    Case(5, 16, 2, static=True, training=False, affine=False, surrogate="triangle", detach_reset=True),
]


class Compiler:
    """Replaces a kernel: a launch compiles the kernel for the given arguments and does not run it."""

    def __init__(self, kernel, capability):
        self.function = kernel.fn if isinstance(kernel, Autotuner) else kernel
        self.tuned = isinstance(kernel, Autotuner)
        self.target = GPUTarget("cuda", capability, 32)

    def __getitem__(self, _grid):
        return self.compile

    def compile(self, *args, enable_fp_fusion, **constants):
        names = self.function.arg_names
        tile, warps = kernels.SHAPES[-1]
        constants |= {"TILE": tile} if self.tuned else {}
        types = {name: type_of(value) for name, value in zip(names, args, strict=False)}
        constants |= {name: value for name, value in zip(names, args, strict=False) if types[name] == "constexpr"}
        source = ASTSource(
            self.function,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": warps, "enable_fp_fusion": enable_fp_fusion}
        code = triton.compile(source, self.target, options).asm["cubin"]
        print(self.function.__name__, len(code))


def type_of(value) -> str:
    """Return the Triton type of an argument; as in a launch, None and 1 are compile-time constants."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}[str(value.dtype).removeprefix("torch.")]
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for name in ("stats", "pool_statistics", "forward", "backward", "pool_sums", "finish"):
        setattr(kernels, name, Compiler(getattr(kernels, name), capability))
    ops.triton.INTERPRETED = True  # so that the op accepts CPU tensors
    for case in CASES:
        run(case, "triton")


if __name__ == "__main__":
    main()

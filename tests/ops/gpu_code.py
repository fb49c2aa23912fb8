"""Compiles the Triton kernels to a GPU's machine code, without a GPU, and reports what that code needs.

usage: python gpu_code.py [--json] [COMPUTE CAPABILITY ...]

It calls the ops as a user would, but where a kernel would be launched it is compiled for those arguments. The code is
that of a real launch, which depends on the alignment of pointers and on numbers that are 1 or multiples of 16. Prints
one line for each kernel and case:

    registers, spills    of a thread: number of registers, bytes spilled to memory
    shared               bytes of shared memory of a program

and in the loops over time, or in the whole kernel where it has none:

    barriers             number
    bytes                loaded and stored for each element of a time step
    widths               for each tensor, the bytes of a thread's narrowest load or store
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch.distributed as dist
import triton
from cases import Case, run
from torch import Tensor, bfloat16
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multifire import ops
from multifire.ops import triton_kernels as kernels

KERNELS = ("measure", "forward", "backward", "coefficients_of_sums", "finish", "pack", "unpack")
CAPABILITIES = (80, 90, 120)
OP_CASES = {
    "CIFAR-10, bf16": Case(4, 64, add_after=True, dtype=bfloat16, size=(2, 8, 8)),
    "CIFAR-10, fp32": Case(4, 64, add_after=True, size=(2, 8, 8)),
    "Gesture, bf16": Case(40, 16, add_after=True, dtype=bfloat16, size=(2, 8, 8)),
    "contiguous": Case(1, 3, 1, layout="contiguous", add_before=True),
    "8 levels": Case(8, 32, 8, add_after=True, dtype=bfloat16, size=(2, 8, 8)),
    "odd": Case(9, 17, 5, add_before=True, add_after=True, state=True, surrogate="atan"),
    "static": Case(5, 16, 2, static=True, training=False, affine=False, surrogate="triangle", detach_reset=True),
    "one value": Case(3, 1, 1, training=False, size=(1, 1, 1)),
    "learned, 40 steps": Case(40, 16, add_after=True, learned=True, dtype=bfloat16, size=(2, 8, 8)),
    "learned, 8 levels": Case(8, 32, 8, add_after=True, learned=True, dtype=bfloat16, size=(2, 8, 8)),
    "MSF": Case(4, 64, add_after=True, learned=True, membranes="shared", reset="any", size=(2, 8, 8)),
    "I-LIF, bf16": Case(4, 64, 4, add_after=True, membranes="shared", reset="subtract", dtype=bfloat16, size=(2, 8, 8)),
    "ternary": Case(10, 32, 1, add_before=True, signed=True, learned=True, surrogate="gaussian", size=(2, 8, 8)),
    "signed, 8 levels": Case(9, 17, 8, learned=True, signed=True, reset="subtract", state=True, surrogate="sigmoid"),
}


def norm_of_all_processes() -> None:
    """A norm alone, over the samples of all processes: here one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    x, weight, bias = torch.ones(4, 2, 16, 3, 3, requires_grad=True), torch.ones(16), torch.ones(16)
    y = ops.tdbn(x, weight, bias, torch.zeros(16), torch.ones(16), training=True, sync=True, backend="triton")
    y.sum().backward()
    dist.destroy_process_group()


def pack_and_unpack(bits: int, dtype: torch.dtype) -> None:
    spikes = torch.ones(4096, dtype=dtype)
    ops.triton.unpack(ops.triton.pack(spikes, bits), bits, spikes)


CASES: dict[str, Callable[[], Any]] = {
    **{name: partial(run, case, "triton") for name, case in OP_CASES.items()},
    "norm, all processes": norm_of_all_processes,
    **{f"{bits} bits, bf16": partial(pack_and_unpack, bits, bfloat16) for bits in (2, 4, 8)},
    "2 bits, fp32": partial(pack_and_unpack, 2, torch.float32),
}


class Compiler:
    """Takes the place of a kernel; compiles it instead of launching it."""

    def __init__(self, kernel, capability: int, as_line: Callable[[dict[str, Any]], str]):
        self.kernel, self.target, self.as_line = kernel, GPUTarget("cuda", capability, 32), as_line
        self.case = ""

    def __getitem__(self, _grid):
        return self.compile

    def compile(self, *args, enable_fp_fusion=False, num_warps=4, maxnreg=None, **constants):
        names = self.kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **constants}
        varying = set(self.kernel.do_not_specialize or ())
        types = {name: type_of(values[name], name in varying) for name in names[: len(args)]}
        source = ASTSource(
            self.kernel,
            {name: types.get(name, "constexpr") for name in names},
            {(i,): values[name] for i, name in enumerate(names) if types.get(name, "constexpr") == "constexpr"},
            {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(names)
                if name not in varying and types.get(name, "constexpr") != "constexpr" and is_aligned(values[name])
            },
        )
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion, "maxnreg": maxnreg}
        compiled = triton.compile(source, self.target, options)
        steps = values["SEGMENT"] if "SEGMENT" in values else 8 // values.get("BITS", 8)
        elements = steps * (values.get("TILE") or values["BLOCK_C"])
        report = {
            "capability": self.target.arch,
            "kernel": self.kernel.__name__,
            "case": self.case,
            **resources(compiled.asm["cubin"]),
            "shared": compiled.metadata.shared,
            **data_loops(compiled.asm["ptx"], names_of_parameters(types), 32 * num_warps / elements),
        }
        print(self.as_line(report))


def type_of(value: Any, varies: bool) -> Any:
    """Return the type of an argument as a launch sees it: None and 1 become part of the code."""
    if value is None or (not varies and isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(type_of(each, varies) for each in value)
    if isinstance(value, Tensor):
        names = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "int32": "i32", "uint8": "u8"}
        return "*" + names[str(value.dtype).removeprefix("torch.")]
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0 and value != 1


def names_of_parameters(types: dict[str, Any]) -> list[str]:
    """Return the names of the arguments that the machine code has as parameters, in order."""
    return [
        name
        for name, kind in types.items()
        for each in (kind if isinstance(kind, tuple) else (kind,))
        if each != "constexpr"
    ]


def resources(cubin: bytes) -> dict[str, int]:
    """Return what the machine code says that it needs. Nothing but spilled registers lies in local memory here."""
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [reader, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": used["REG"], "spills": used["STACK"] + used["LOCAL"]}


class Access(NamedTuple):
    """A load or store of a thread."""

    parameter: str
    bytes: int


def data_loops(ptx: str, parameters: list[str], threads_per_element: float) -> dict[str, Any]:
    """Return barriers, bytes for each element and widths in the loops over the data."""
    lines = ptx.splitlines()
    accesses = find_accesses(lines, parameters)
    bodies = [body for body in innermost_loops(lines) if is_over_data(lines, body, accesses)] or [range(len(lines))]
    within = [accesses[i] for body in bodies for i in body if i in accesses]
    widths = {
        name: min(access.bytes for access in within if access.parameter == name)
        for name in parameters
        if any(access.parameter == name for access in within)
    }
    return {
        "barriers": sum("bar.sync" in lines[i] for body in bodies for i in body),
        "bytes": round(sum(access.bytes for access in within) * threads_per_element, 2),
        "widths": widths,
    }


def innermost_loops(lines: list[str]) -> Iterator[range]:
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L\w+:", line)}
    jumps = [(i, re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) for i, line in enumerate(lines)]
    loops = [(labels[jump[1]], i) for i, jump in jumps if jump and labels.get(jump[1], i) < i]
    for start, end in loops:
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops):
            yield range(start, end)


def is_over_data(lines: list[str], body: range, accesses: dict[int, Access]) -> bool:
    """Return True if the loop loads or stores; the one that adds up partial sums is not over the data."""
    names = {accesses[i].parameter for i in body if i in accesses}
    return bool(names) and not names & {"parts", "learned_parts"}


ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.\w+)*?((?:\.v\d)?\.[bfu]\d+)\s.*?\[\s*(%rd\d+)")
REGISTER = re.compile(r"%rd\d+")


def find_accesses(lines: list[str], parameters: list[str]) -> dict[int, Access]:
    """Return the loads and stores by line; each address is followed back to the parameter that it comes from."""
    pointers: dict[str, str] = {}
    changed = True
    while changed:  # a loop's registers may be set after they are read
        before = len(pointers)
        for line in lines:
            if parameter := re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
                if int(parameter[2]) < len(parameters):
                    pointers[parameter[1]] = parameters[int(parameter[2])]
            elif not re.search(r"\b(ld|st|setp|atom)\.", line):
                target, *sources = REGISTER.findall(line) or [""]
                known = [pointers[source] for source in sources if source in pointers]
                if known:
                    pointers.setdefault(target, known[0])
        changed = len(pointers) > before
    return {
        i: Access(pointers.get(found[2], "?"), width(found[1]))
        for i, line in enumerate(lines)
        if (found := ACCESS.search(line))
    }


def width(access: str) -> int:
    """Return the bytes of a load or store such as .v4.b32."""
    count, bits = re.fullmatch(r"(?:\.v(\d))?\.[bfu](\d+)", access).groups()
    return int(count or 1) * int(bits) // 8


def as_text(report: dict[str, Any]) -> str:
    widths = " ".join(f"{name}:{width}" for name, width in report["widths"].items())
    numbers = " ".join(f"{name} {report[name]:<5}" for name in ("registers", "spills", "shared", "barriers", "bytes"))
    return f"sm_{report['capability']:<3} {report['kernel']:20} {report['case']:19} {numbers} {widths}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES)
    options = parser.parse_args()
    originals = {name: getattr(kernels, name) for name in KERNELS}
    ops.triton.why_not = lambda x, levels: None  # tensors of the CPU stand for a GPU's
    as_line = json.dumps if options.json else as_text
    for capability in options.capabilities:
        compilers = {name: Compiler(kernel, capability, as_line) for name, kernel in originals.items()}
        for name, compiler in compilers.items():
            setattr(kernels, name, compiler)
        for name, call in CASES.items():
            for compiler in compilers.values():
                compiler.case = name
            call()


if __name__ == "__main__":
    main()

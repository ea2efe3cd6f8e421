"""PTX on the CPU: reads what a compiler wrote, and runs it in ``machine.cpp``."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import native_module
from torch import Tensor

SPECIAL = ["%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x"]  # the machine's first registers
ALWAYS_ZERO = {"%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"}
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def load_machine() -> ModuleType:
    """The module made of ``machine.cpp``."""
    here, csrc = Path(__file__).parent, native_module.ROOT / "csrc"
    return native_module.load("ptx_machine", [here / "machine.cpp"], [here, csrc / "math", csrc / "tensor.h"], [csrc])


class Parameter(NamedTuple):
    offset: int  # among the kernel's parameters, in bytes
    size: int
    type: str  # "u64", "f32", "b8" for a struct


class Kernel:
    """One ``.entry`` of a PTX file.

    Args:
        machine: The module made of ``machine.cpp``.
        text: The file.
        name: Of the entry; with a single one in the file, None will do.

    Raises:
        ValueError: A statement that is not understood.
    """

    def __init__(self, machine: Any, text: str, name: str | None = None) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        entries = {m[1]: m for m in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", text, flags=re.DOTALL)}
        self.name = name or next(iter(entries))
        header = entries[self.name]
        self._machine = machine
        self._body = text[header.end() : _end_of_block(text, header.end())]
        self.parameters = _parameters(header[2])
        self._registers = {name: i for i, name in enumerate(SPECIAL)}
        self._plainly_named = set(re.findall(r"\.reg\s+\.\w+\s+(\w+)\s*;", self._body))  # those without a %
        self._constants: dict[int, int] = {}
        self._shared, self.static_shared = _shared_variables(text[: entries[self.name].start()] + self._body)

    def run(
        self,
        grid: int,
        threads: int,
        arguments: bytes,
        tensors: Sequence[Tensor],
        *,
        dynamic_shared: int = 0,
        seed: int = 0,
        blocks_side_by_side: int = 3,
    ) -> Any:
        """Runs the grid; the tensors are all the memory there is. Returns counts.

        Raises:
            RuntimeError: The kernel does what it must not; the message has the instruction.
        """
        ranges = [(f"[{', '.join(map(str, t.shape))}]", *extent(t)) for t in tensors if t.numel() > 0]
        shared = self.static_shared + dynamic_shared
        return self._program.run(grid, threads, arguments, ranges, shared, seed, blocks_side_by_side)

    def without(self, line: int) -> Kernel:
        """The kernel less one of its statements."""
        other = object.__new__(Kernel)
        other.__dict__ = {k: v for k, v in self.__dict__.items() if k != "_program"}
        other.statements = [s if i != line else ";" for i, s in enumerate(self.statements)]
        return other

    @cached_property
    def statements(self) -> list[str]:
        """Labels end with a colon, all others with a semicolon; directives are left out."""
        lines = [line for line in self._body.splitlines() if not re.match(r"\s*\.(loc|pragma|file|section)\b", line)]
        found = re.findall(r"[{}\s]*([\w$]+:(?!:)|[^;]*;)", "\n".join(lines))
        found = [" ".join(s.split()) for s in found]
        return [s for s in found if not re.match(r"\.(reg|shared)\b", s)]

    @cached_property
    def _program(self) -> Any:
        rows, labels, branches = [], {}, []
        for statement in self.statements:
            if statement.endswith(":"):
                labels[statement[:-1]] = len(rows)
            elif statement.strip("{}; "):
                row, label = self._instruction(statement)
                if label:
                    branches.append((len(rows), label))
                rows.append(row)
        for at, label in branches:
            rows[at][6] = labels[label]
        return self._machine.Program([tuple(r) for r in rows], len(self._registers), list(self._constants.items()))

    def _instruction(self, statement: str) -> tuple[list, str | None]:
        match = re.fullmatch(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*);", statement)
        if match is None:
            raise ValueError(f"{self.name}: cannot read {statement!r}")
        negated, guard, mnemonic, rest = match.groups()
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", rest)
        guard_register = self._register(guard) if guard else -1
        row: list = [mnemonic, guard_register, negated == "!", [], [], 0, 0, statement]
        if mnemonic.startswith("bra"):
            return row, operands[0]
        if mnemonic == "bar.sync" and operands != ["0"]:
            raise ValueError(f"{self.name}: only barrier 0 is known, for all threads: {statement!r}")
        if mnemonic.startswith("mov") and any(o.startswith("{") for o in operands):
            row[0] = mnemonic.replace("mov", "unpack" if operands[0].startswith("{") else "pack")
        writes = not mnemonic.startswith(("st", "bar", "ret", "exit", "cp.async.bulk.prefetch"))
        for place, operand in enumerate(operands):
            if operand.startswith("["):
                base, row[5] = self._address(operand[1:-1])
                row[4].append(base)
                continue
            parts = operand.strip("{}").split(",") if operand.startswith("{") else re.split(r"\|", operand)
            where = row[3] if writes and place == 0 else row[4]
            where += [self._operand(part.strip()) for part in parts]
        return row, None

    def _address(self, text: str) -> tuple[int, int]:
        """(register, bytes) of ``%rd1 + 16``, ``global_smem+4``, ``kernel_param_3+8``."""
        base, *offsets = re.split(r"\s*\+\s*", text.strip())
        return self._operand(base), sum(int(o, 0) for o in offsets)

    def _operand(self, text: str) -> int:
        if text == "_":
            return -1
        if text in ALWAYS_ZERO:
            return self._constant(0)
        if text.startswith("%") or text in self._plainly_named:
            return self._register(text)
        if text in self.parameters:
            return self._constant(self.parameters[text].offset)
        if text in self._shared:
            return self._constant(self._shared[text])
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return self._constant(int(match[1] or match[2], 16))
        try:
            return self._constant(int(text.rstrip("U"), 0) % 2**64)
        except ValueError:
            raise ValueError(f"{self.name}: cannot read the operand {text!r}") from None

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _constant(self, bits: int) -> int:
        register = self._register(f"constant {bits}")
        self._constants[register] = bits
        return register


def extent(t: Tensor) -> tuple[int, int]:
    """First address of a tensor's elements, and the one behind its last; not its storage, which may be larger."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def packed(parameters: dict[str, Parameter], values: Sequence[Any]) -> bytes:
    """The bytes of a kernel's parameters; a tensor stands for its address, and None for parameters without a value."""
    out = bytearray(max(p.offset + p.size for p in parameters.values()))
    for parameter, value in zip(parameters.values(), values, strict=False):
        value = value.data_ptr() if isinstance(value, Tensor) else value
        code = {"f32": "f", "f64": "d", "u64": "Q", "b64": "Q"}.get(parameter.type, "i")
        struct.pack_into(f"<{code}", out, parameter.offset, value)
    return bytes(out)


def _parameters(header: str) -> dict[str, Parameter]:
    found, offset = {}, 0
    for declaration in filter(None, map(str.strip, header.split(","))):
        match = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?", declaration)
        if match is None:
            raise ValueError(f"cannot read the parameter {declaration!r}")
        element = SIZES[re.sub(r"\D", "", match[2])]
        size, alignment = element * int(match[4] or 1), int(match[1] or element)
        offset = -(-offset // alignment) * alignment
        found[match[3]] = Parameter(offset, size, match[2])
        offset += size
    return found


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Offsets of the variables in shared memory, and the bytes of those whose size is known to the compiler."""
    offsets, used = {}, 0
    pattern = r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;"
    for match in re.finditer(pattern, text):
        element = SIZES[re.sub(r"\D", "", match[3])]
        alignment = int(match[2] or element)
        used = -(-used // alignment) * alignment
        offsets[match[4]] = used
        if not match[1]:
            used += element * int(match[5] or 1)
    return offsets, used


def _end_of_block(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError("a brace is missing")

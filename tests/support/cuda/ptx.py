"""What NVRTC makes of a CUDA source, on the CPU: PTX is translated to C++ that runs on the emulator.

The emulator runs the source, as g++ understands it. This runs the compiler's own code, and its memory is watched
(ptx_on_cpu.h): it finds races that no order of threads on the emulator would show, copies that are read before they
have arrived, and stray prefetches, which read nothing.

Each PTX register is a variable, each instruction a statement with the number of its line. An instruction that is not
known here is an error.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.support.cuda.emulator import CACHE

HEADER: Final = Path(__file__).with_name("ptx_on_cpu.h")
_BASE: Final = 0x400
"""The address of the first byte that shared variables may have, from compute capability 9.0 on."""
_GAP: Final = 32
_SPECIAL: Final = {
    "%tid.x": "threadIdx.x",
    "%ctaid.x": "blockIdx.x",
    "%ntid.x": "blockDim.x",
    "%nctaid.x": "gridDim.x",
    "%laneid": "(threadIdx.x % 32)",
}
_TYPES: Final = {f"{kind}{bits}": f"{'s' if kind == 's' else 'u'}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)}
_TYPES["pred"] = "bool"
_COMPARISONS: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Operands by their places; arithmetic is modulo 2^64, and an assignment keeps the bits that the register has.
_SIMPLE: Final = {
    "add": "{1} + {2}",
    "sub": "{1} - {2}",
    "mul.lo": "{1} * {2}",
    "mul.wide": "{1} * {2}",
    "mul.hi": "({1} * {2}) >> 32",
    "mad.lo": "{1} * {2} + {3}",
    "div": "ptx::divide({1}, {2}, false)",
    "rem": "ptx::divide({1}, {2}, true)",
    "and": "{1} & {2}",
    "or": "{1} | {2}",
    "xor": "{1} ^ {2}",
    "not": "~{1}",
    "neg": "0 - {1}",
    "min": "{1} < {2} ? {1} : {2}",
    "max": "{1} > {2} ? {1} : {2}",
    "selp": "{3} ? {1} : {2}",
    "mov": "{1}",
    "brev": "__brev(u32({1}))",
    "popc": "__popcll({1})",
    "prmt": "cuda_on_cpu_prmt(u32({1}), u32({2}), u32({3}))",
    "shf.r.wrap": "__funnelshift_r(u32({1}), u32({2}), u32({3}))",
    "shf.l.wrap": "__funnelshift_l(u32({1}), u32({2}), u32({3}))",
    "bfi": "ptx::insert_bits(u32({1}), u32({2}), u32({3}), u32({4}))",
    "lop3": "ptx::logic(u32({1}), u32({2}), u32({3}), u32({4}))",
    "shl": "u32({2}) < {bits} ? {1} << u32({2}) : 0",
    "shr": "u32({2}) < {bits} ? {1} >> u32({2}) : 0",
    "cvta.to.global": "{1}",
    "cvta.shared": "{1} + ptx::shared_window",
    "cvta.to.shared": "{1} - ptx::shared_window",
    "match.any.sync": "__match_any_sync(u32({2}), u32({1}))",
}
_SIGNED: Final = {"setp", "min", "max", "cvt", "mul.wide", "ld"}
"""The instructions whose results depend on whether numbers are signed; others are refused where it would matter."""


class PtxError(Exception):
    """PTX that is not understood; the text names the line."""


def write(ptx: str) -> tuple[Path, Path]:
    """Files for the emulator: the translation, and the list of its kernels."""
    code, kernels = translate(ptx)
    folder = CACHE / f"ptx-{hashlib.sha256((code + HEADER.read_text(encoding='utf-8')).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("decode.cu", code),
        ("kernels.h", "".join(f"CUDA_ON_CPU_KERNEL({kernel})\n" for kernel in kernels)),
    ):
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(folder / name)  # Others may be reading it.
    return folder / "decode.cu", folder / "kernels.h"


def translate(ptx: str) -> tuple[str, list[str]]:
    """C++ for all kernels of some PTX, and their names."""
    kernels = [_Kernel(match, ptx) for match in re.finditer(r"^\.visible \.entry (\w+)\((.*?)^\)", ptx, re.M | re.S)]
    if not kernels:
        raise PtxError("no kernel")
    # Threads store neighbouring bytes in any order: no race may be seen in that.
    unit = 1 if re.search(r"st\.global\.[bsu]8", ptx) else 2
    head = f'#define PTX_UNIT {unit}\n#include "{HEADER}"\n'
    return head + "\n".join(kernel.code for kernel in kernels), [kernel.name for kernel in kernels]


class _Kernel:
    def __init__(self, head: re.Match[str], ptx: str) -> None:
        self.name = head[1]
        self._symbols: dict[str, str] = {}  # parameters and shared variables: their addresses
        self._shared: list[tuple[int, int]] = []
        self._registers: list[str] = []
        body = ptx.index("\n{", head.end()) + 2
        end = ptx.index("\n}", body)
        first_line = ptx.count("\n", 0, body) + 1
        parameters = self._parameters(head[2])
        statements = [
            text
            for number, line in enumerate(ptx[body:end].split("\n"), first_line)
            if (text := self._line(line.split("//")[0].strip(), number))
        ]
        variables = ", ".join(f"{{{begin}, {end}}}" for begin, end in self._shared)
        self.code = "\n".join(
            [
                *parameters[0],
                f'extern "C" __attribute__((no_sanitize("undefined"))) void {self.name}({", ".join(parameters[1])}) {{',
                f"static const u32 variables[][2] = {{{variables}}};",
                f"ptx::enter(variables, {len(self._shared)});",
                *self._registers,
                *statements,
                "}",
            ]
        )

    def _parameters(self, text: str) -> tuple[list[str], list[str]]:
        types, parameters = [], []
        for line in filter(None, (part.strip() for part in text.split(","))):
            words = line.split()
            name = words[-1].partition("[")[0]
            if size := re.search(r"\.align (\d+) \.b8 \w+\[(\d+)\]", line):
                types.append(f"struct {name}_type {{ alignas({size[1]}) u8 bytes[{size[2]}]; }};")
                parameters.append(f"{name}_type {name}")
            else:
                parameters.append(f"{_TYPES[words[1][1:]]} {name}")
            self._symbols[name] = f"u64(&{name})"
        return types, parameters

    def _line(self, text: str, number: int) -> str:
        if label := re.fullmatch(r"\$(\w+):", text):
            return f"{label[1]}:;"
        found = []
        for part in filter(None, re.split(r"\s*;\s*|(?<=^\{)\s*|\s*(?=\}$)", text)):
            try:
                found.append(part if part in "{}" else self._statement(part))
            except (KeyError, IndexError, PtxError) as error:
                raise PtxError(f"line {number}: {text!r} is not understood: {error!r}") from None
        return f'#line {number} "ptx"\n{" ".join(found)}' if found else ""

    def _statement(self, text: str) -> str:
        if text.startswith("."):
            return self._declaration(text)
        guard = re.match(r"@(!?)%(\w+)\s+", text)
        if guard:
            return f"if ({guard[1]}{guard[2]}) {{ {self._statement(text[guard.end() :])} }}"
        opcode, _, rest = text.partition(" ") if "\t" not in text else text.partition("\t")
        operands = [part.strip() for part in re.split(r",(?![^{]*\})", rest) if part.strip()]
        words = opcode.strip().split(".")
        return _OTHERS.get(words[0], _Kernel._simple)(self, words, operands)

    def _declaration(self, text: str) -> str:
        if register := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)(?:<(\d+)>)?", text):
            kind, name, count = _TYPES[register[1]], register[2], register[3]
            if count is None:  # within braces of its own, which jumps do not enter
                return f"{kind} {name};"
            initial = "true" if kind == "bool" else f"{kind}(0xDEADBEEFCAFEF00D)"
            self._registers += [f"{kind} {name}{i} = {initial};" for i in range(int(count))]
            return ""
        if variable := re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            alignment, size = int(variable[1]), int(variable[3])
            # No more aligned than it asks for, and not next to another.
            after = self._shared[-1][1] + _GAP if self._shared else _BASE
            begin = -(-after // (2 * alignment)) * 2 * alignment + alignment
            self._shared.append((begin, begin + size))
            self._symbols[variable[2]] = str(begin)
            return ""
        if text.startswith(".pragma"):
            return ""
        raise PtxError("declaration")

    def _value(self, operand: str, kind: str) -> str:
        if operand in self._symbols:
            return self._symbols[operand]
        if operand in _SPECIAL:
            return f"u64({_SPECIAL[operand]})"
        # First the type's own bits, then 64 of them.
        wide = "s64" if kind.startswith("s") else "u64"
        return f"{wide}({kind}({operand.replace('%', '')}))"

    def _address(self, operand: str) -> str:
        base, _, offset = operand.strip("[]").partition("+")
        return f"({self._value(base, 'u64')} + u64({offset or 0}ll))"

    def _simple(self, words: list[str], operands: list[str]) -> str:
        operation, kind = ".".join(words[:-1]), _TYPES[words[-1]]
        if kind.startswith("s") and operation not in _SIGNED and operation in {"div", "rem", "mul.hi", "shr"}:
            raise PtxError("signed")
        if operation == "mul.hi" and kind != "u32":
            raise PtxError("the upper half of 128 bits")
        kind = kind if operation in _SIGNED else kind.replace("s", "u")
        values = [self._value(operand, kind) for operand in operands[1:]]
        if operation == "selp":
            values[2] = self._value(operands[3], "bool")
        if operation in {"shl", "shr"}:
            values[1] = self._value(operands[2], "u32")
        return f"{_name(operands[0])} = {_SIMPLE[operation].format(None, *values, bits=kind[1:])};"

    def _mov(self, words: list[str], operands: list[str]) -> str:
        kind = _TYPES[words[-1]]
        if operands[0].startswith("{"):
            parts = operands[0].strip("{}").split(",")
            bits = int(kind[1:]) // len(parts)
            return " ".join(
                f"{_name(part)} = {self._value(operands[1], kind)} >> {bits * i};"
                for i, part in enumerate(map(str.strip, parts))
                if part != "_"
            )
        if operands[1].startswith("{"):
            parts = [part.strip() for part in operands[1].strip("{}").split(",")]
            bits = int(kind[1:]) // len(parts)
            joined = " | ".join(f"{self._value(part, f'u{bits}')} << {bits * i}" for i, part in enumerate(parts))
            return f"{_name(operands[0])} = {joined};"
        if kind == "bool":
            return f"{_name(operands[0])} = {operands[1].replace('%', '')} != 0;"
        return self._simple(words, operands)

    def _not(self, words: list[str], operands: list[str]) -> str:
        if words[-1] == "pred":
            return f"{_name(operands[0])} = !{_name(operands[1])};"
        return self._simple(words, operands)

    def _setp(self, words: list[str], operands: list[str]) -> str:
        left, right = (self._value(operand, _TYPES[words[2]]) for operand in operands[1:])
        return f"{_name(operands[0])} = {left} {_COMPARISONS[words[1]]} {right};"

    def _cvt(self, words: list[str], operands: list[str]) -> str:
        return f"{_name(operands[0])} = {_TYPES[words[1]]}({self._value(operands[1], _TYPES[words[2]])});"

    def _memory(self, words: list[str], operands: list[str]) -> str:
        kind = _TYPES[words[-1]]
        count = {"v2": 2, "v4": 4}.get(words[-2], 1)
        size = int(kind[1:]) // 8 * count
        loads = words[0] == "ld"
        inside, address = operands if loads else reversed(operands)
        registers = [part.strip() for part in inside.strip("{}").split(",")]
        place = {
            ("param", True): f"(u8*){self._address(address)}",
            ("shared", True): f"ptx::read_shared({self._address(address)}, {size})",
            ("shared", False): f"ptx::write_shared({self._address(address)}, {size})",
            ("global", True): f"ptx::read_global({self._address(address)}, {size}, {str('nc' in words).lower()})",
            ("global", False): f"ptx::write_global({self._address(address)}, {size})",
        }[words[1], loads]
        each = [
            f"{_name(register)} = place[{i}];" if loads else f"place[{i}] = {kind}({self._value(register, kind)});"
            for i, register in enumerate(registers)
            if register != "_"
        ]
        return f"{{ {kind}* place = ({kind}*){place}; {' '.join(each)} }}"

    def _atom(self, words: list[str], operands: list[str]) -> str:
        if words[-3:] != ["global", "or", "b32"]:
            raise PtxError("atomic operation")
        return (
            f"{_name(operands[0])} = atomicOr((u32*){self._address(operands[1])}, {self._value(operands[2], 'u32')});"
        )

    def _cp(self, words: list[str], operands: list[str]) -> str:
        if words == ["cp", "async", "wait_all"]:
            return "ptx::wait_for_copies();"
        if words != ["cp", "async", "cg", "shared", "global"] or operands[2] != "16":
            raise PtxError("copy")
        return f"ptx::copy_async({self._address(operands[0])}, {self._address(operands[1])});"

    def _prefetch(self, _words: list[str], operands: list[str]) -> str:
        return f"ptx::prefetch({self._address(operands[0])});"

    def _bar(self, words: list[str], operands: list[str]) -> str:
        if words == ["bar", "warp", "sync"]:
            return f"ptx::warp_barrier({self._value(operands[0], 'u32')});"
        if operands != ["0"]:
            raise PtxError("barrier")
        return "ptx::barrier();"

    def _shfl(self, words: list[str], operands: list[str]) -> str:
        result, _, moved = operands[0].partition("|")
        which = {"up": "up", "idx": "index"}[words[2]]
        mask, value, by, clamp = (self._value(operands[i], "u32") for i in (4, 1, 2, 3))
        return f"{{ bool moved; {_name(result)} = ptx::shuffle_{which}({mask}, {value}, {by}, {clamp}, moved);" + (
            f" {_name(moved)} = moved; }}" if moved else " }"
        )

    def _bra(self, _words: list[str], operands: list[str]) -> str:
        return f"goto {operands[0].removeprefix('$')};"

    def _ret(self, _words: list[str], _operands: list[str]) -> str:
        return "ptx::leave(); return;"


def _name(register: str) -> str:
    if not re.fullmatch(r"%\w+", register):
        raise PtxError(register)
    return register[1:]


_Translator = Callable[[_Kernel, list[str], list[str]], str]
_OTHERS: Final[dict[str, _Translator]] = {
    "mov": _Kernel._mov,
    "not": _Kernel._not,
    "setp": _Kernel._setp,
    "cvt": _Kernel._cvt,
    "ld": _Kernel._memory,
    "st": _Kernel._memory,
    "atom": _Kernel._atom,
    "cp": _Kernel._cp,
    "prefetch": _Kernel._prefetch,
    "bar": _Kernel._bar,
    "barrier": _Kernel._bar,
    "shfl": _Kernel._shfl,
    "bra": _Kernel._bra,
    "ret": _Kernel._ret,
}

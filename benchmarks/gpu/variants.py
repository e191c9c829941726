"""Variants of decode.cu with one change each, timed next to it: what a choice is worth on this GPU."""

from __future__ import annotations

import re
from typing import Final

from df11.runtime import kernels

CHANGES: Final[dict[str, list[tuple[str, str]]]] = {
    "as it is": [],
    "no prefetching while the table is expanded": [(r"\n[^\n]*prefetch\(bytes \+ i\);", "")],
    "sign/mantissa bytes loaded 2 chunks ahead": [(r"decode_whole<WIDE_GROUP,", "decode_whole<2,")],
    "sign/mantissa bytes loaded 8 chunks ahead": [(r"decode_whole<WIDE_GROUP,", "decode_whole<8,")],
    "sign/mantissa bytes that may be loaded behind the wait": [(r"__syncwarp\(\);  // The assembler[^\n]*\n", "")],
    "two logic operations to join exponents and the rest": [
        (r"select_bits\((__byte_perm\([^)]*\)), pair, (0x807F807F)\)", r"(\1 & \2) | (pair & ~\2)")
    ],
    "loads without a hint": [(r"__ldcs\(source", "__ldg(source")],
    "stores with the hint that nothing is reused": [
        (
            r"(reinterpret_cast<uint4\*>\(output\))\[i / 4\] =\s*(make_uint4\([^;]*\));",
            r"__stcs(\1 + i / 4, \2);",
        )
    ],
    "at least 4 blocks per multiprocessor": [
        (r"__launch_bounds__\(WIDE_THREADS\)", "__launch_bounds__(WIDE_THREADS, 4)")
    ],
}
"""Name -> regular expressions and their replacements; each must match at least once."""


def source(name: str) -> str:
    """The source of a variant."""
    text = kernels.SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in CHANGES[name]:
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise ValueError(f"decode.cu no longer has anything like {pattern!r}")
    return text

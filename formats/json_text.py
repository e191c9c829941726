"""A stranger's JSON: read with limits on its size, and refused where readers would take it in different ways."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from df11.formats import errors, layout

_STRING: Final = r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)'
"""A string. One that does not end takes the rest of the text; otherwise each quote in it would be tried as a start."""
_STRINGS: Final = re.compile(_STRING, re.DOTALL)
_PART: Final = re.compile(rf'(?:[^"]++|{_STRING}){{1,10000}}+', re.DOTALL)
"""Some text that ends outside of a string: taking strings out takes many times the memory of a short one."""
_SURROGATE: Final = re.compile(r"\\u[dD]")
_MINUS_ZERO: Final = re.compile(r"[\[:,\s]-0(?![0-9])")
_CONTAINER_VALUES: Final = 4
"""A list or an object takes about four times the memory of a number."""


def most_values(size: int) -> int:
    """The values that a header, or JSON about its tensors, may have; ``size``: bytes of the container's header.

    An entry of one dimension, with the shortest name there is, has 16 in 51 bytes.
    """
    return 65_536 + size // 3


def count_values(text: str) -> int:
    """An upper bound on the values of a JSON text, without making any; a list or an object counts as four.

    Commas and brackets inside strings count, too.
    """
    return 1 + text.count(",") + _CONTAINER_VALUES * (text.count("[") + text.count("{"))


def _more_values_than(text: str, most: int) -> bool:
    if count_values(text) <= most:
        return False
    for part in _PART.finditer(text):
        most -= count_values(_STRINGS.sub("", part.group())) - 1
        if most < 1:
            return True
    return False


def parse(
    data: bytes | str,
    *,
    what: str,
    where: Mapping[str, Any],
    error: type[errors.Df11Error] = errors.FormatError,
    values: int | None = None,
    depth: int | None = layout.MAX_JSON_DEPTH,
) -> Any:
    """The value of a JSON text (RFC 8259, in UTF-8).

    ``what`` names the text in messages; ``where`` has keywords of a Df11Error: file, tensor.

    Refused with ``error``: text that is not JSON (NaN is not), an object that names a member twice, half a surrogate
    pair. Refused with a LimitError: more than 100,000,000 bytes (characters of a str); more than ``values`` values,
    counted before any is made, a list or an object as four (None: as many as :func:`most_values` allows for its size);
    lists and objects inside each other more than ``depth`` deep (None: the caller calls :func:`check_depth` for all
    members that it does not look into, which takes less time).
    """
    if len(data) > layout.MAX_JSON_HEADER:
        raise errors.LimitError(
            f"{what} is too large", **where, expected=f"at most {layout.MAX_JSON_HEADER} bytes", found=len(data)
        )
    values = most_values(len(data)) if values is None else values
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if _more_values_than(text, values):
            raise errors.LimitError(f"{what} has too many values", **where, expected=f"at most {values}")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            # Python reads -0 as the integer 0; it is not made of digits.
            parse_int=_integer if "-" in text and "-0" in text and _MINUS_ZERO.search(text) else None,
        )
        if "\\u" in text and _SURROGATE.search(text):  # JSON can spell half a surrogate pair, which UTF-8 cannot.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise errors.LimitError(f"{what} is nested too deeply", **where) from None
    except _TwiceError as twice:
        raise error(
            f"{what} names a member of an object twice", **where, found=errors.shortened(twice.args[0])
        ) from None
    except UnicodeEncodeError:
        raise error(f"{what} has text that is not valid Unicode", **where) from None
    except ValueError as problem:
        raise error(f"{what} is not JSON ({problem})", **where) from None
    if depth is not None:
        check_depth(value, depth, what=what, where=where)
    return value


def check_depth(value: object, most: int, *, what: str, where: Mapping[str, Any]) -> None:
    """Raise a LimitError if a value of JSON has lists and objects inside each other more than ``most`` deep."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        if not level:
            return
        level = [
            child
            for outer in level
            for child in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(child, dict | list)
        ]
    if level:
        raise errors.LimitError(f"{what} is nested too deeply", **where, expected=f"at most {most} levels")


class _TwiceError(Exception):
    """A member of an object that occurs twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(name for name, _ in pairs if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)

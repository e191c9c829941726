"""Regular expressions of strangers, matched against whole names in time that grows with the name alone.

DFloat11's loader gives them to Python's ``re``, where ``(a+)+b`` takes for ever. Here they become a finite automaton,
which can be in many states at once and never goes back. What no automaton can do (look around, refer back) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NoReturn

from df11.formats import errors

LONGEST: Final = 1000
"""Characters of an expression."""
MOST_STATES: Final = 4000
MOST_GROUPS: Final = 20
"""Groups inside each other."""
_MOST_KEPT: Final = 2000
"""Transitions that are remembered."""

_Test = Callable[[str], bool]

_CLASSES: Final[dict[str, _Test]] = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
    "D": lambda c: not c.isdigit(),
    "W": lambda c: not (c.isalnum() or c == "_"),
    "S": lambda c: not c.isspace(),
}


class Budget:
    """What all patterns of one file may take together: states that are made, and states that are visited."""

    def __init__(self) -> None:
        self.states = 20_000
        self.visits = 5_000_000


class Pattern:
    """A regular expression that names are matched against as a whole. Raises CheckpointError if it is none.

    ``budget``: that of a stranger's file.
    """

    def __init__(self, text: str, *, file: str, budget: Budget | None = None) -> None:
        self.text = text
        self._file = file
        self._budget = budget
        self._at = 0
        self._tests: list[tuple[_Test, int]] = []
        """For each state: what the next character must be, and the state after it."""
        self._free: list[list[int]] = []
        """For each state: the states that it leads to without a character. It has these or a test."""
        if len(text) > LONGEST:
            self._refuse(f"it has more than {LONGEST} characters")
        if text.startswith("^"):
            self._at = 1
        start, end = self._alternatives(0)
        if text[self._at :] not in ("", "$"):
            self._refuse("a group ends that has not begun")
        self._end = end
        self._start = self._closure({start})
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, name: str) -> bool:
        """Whether the whole of ``name`` matches."""
        states = self._start
        for character in name:
            if not states:
                return False
            self._visit(1)
            known = self._known.get((states, character))
            if known is None:
                found = {self._tests[one][1] for one in states if self._tests[one][0](character)}
                known = self._closure(found)
                if len(self._known) < _MOST_KEPT:
                    self._known[states, character] = known
            states = known
        return self._end in states

    def _closure(self, states: set[int]) -> frozenset[int]:
        waiting, found = list(states), set(states)
        while waiting:
            self._visit(1)
            for other in self._free[waiting.pop()]:
                if other not in found:
                    found.add(other)
                    waiting.append(other)
        return frozenset(found)

    def _visit(self, count: int) -> None:
        if self._budget is not None:
            self._budget.visits -= count
            if self._budget.visits < 0:
                self._refuse("it and those before it take too long to match")

    def _refuse(self, why: str) -> NoReturn:
        what = f"pattern_dict: a pattern cannot be read: {why}"
        raise errors.CheckpointError(what, file=self._file, found=errors.shortened(self.text))

    def _state(self, test: _Test = lambda _: False, to: int = 0) -> int:
        if self._budget is not None:
            self._budget.states -= 1
        if len(self._free) == MOST_STATES or (self._budget is not None and self._budget.states < 0):
            self._refuse("it is too large, or those before it are")
        self._tests.append((test, to))
        self._free.append([])
        return len(self._free) - 1

    # Each of these returns the first and the last state of what it has read.

    def _alternatives(self, depth: int) -> tuple[int, int]:
        if depth > MOST_GROUPS:
            self._refuse("its groups are nested too deeply")
        start, end = self._state(), self._state()
        while True:
            first, last = self._sequence(depth)
            self._free[start].append(first)
            self._free[last].append(end)
            if self._peek() != "|":
                return start, end
            self._at += 1

    def _sequence(self, depth: int) -> tuple[int, int]:
        start = end = self._state()
        while self._peek() not in ("", "|", ")") and self.text[self._at :] != "$":
            first, last = self._repeated(depth)
            self._free[end].append(first)
            end = last
        return start, end

    def _repeated(self, depth: int) -> tuple[int, int]:
        began = self._at
        first, last = self._atom(depth)
        least, most = self._quantifier()
        if (least, most) == (1, 1):
            return first, last
        start = end = self._state()
        for number in range(max(least, 1) if most is None else most):
            if number:  # Read once more: a copy of its states.
                after, self._at = self._at, began
                first, last = self._atom(depth)
                self._at = after
            self._free[end].append(first)
            if number >= least:
                self._free[end].append(last)
            end = last
        if most is None:
            self._free[last].append(first)
        return start, end

    def _quantifier(self) -> tuple[int, int | None]:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        found = simple.get(self._peek())
        if found is not None:
            self._at += 1
        elif self._peek() == "{":
            inside, closed, _ = self.text[self._at + 1 :].partition("}")
            least, comma, most = inside.partition(",")
            digits = [part for part in (least, most) if part]
            if (
                not closed
                or not digits
                or not all(part.isascii() and part.isdigit() and len(part) < 3 for part in digits)
            ):
                self._refuse("braces that do not count")
            self._at += len(inside) + 2
            found = int(least or 0), (int(most) if most else None) if comma else int(least)
            if found[1] is not None and found[0] > found[1]:
                self._refuse("braces that do not count")
        else:
            return 1, 1
        if self._peek() in ("?", "+"):  # Lazy or possessive: the same for a whole name.
            self._at += 1
        if self._peek() in ("*", "+", "?", "{"):
            self._refuse("nothing to repeat")
        return found

    def _atom(self, depth: int) -> tuple[int, int]:
        character = self._next()
        if character == "(":
            if self._peek() == "?":
                if self.text[self._at : self._at + 2] != "?:":
                    self._refuse("what groups with (? do is not supported")
                self._at += 2
            first, last = self._alternatives(depth + 1)
            if self._peek() != ")":
                self._refuse("a group does not end")
            self._at += 1
            return first, last
        end = self._state()
        return self._state(self._test(character), end), end

    def _test(self, character: str) -> _Test:
        if character == ".":
            return lambda c: c != "\n"
        if character == "[":
            return self._set()
        if character == "\\":
            return self._escape()
        if character in "*+?{^$":
            self._refuse("nothing to repeat" if character in "*+?{" else f"{character} in the middle")
        return lambda c: c == character

    def _escape(self) -> _Test:
        character = self._next()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum():
            self._refuse(f"what \\{character} does is not supported")
        return lambda c: c == character

    def _set(self) -> _Test:
        negated = self._peek() == "^"
        self._at += negated
        tests: list[_Test] = []
        while self._peek() != "]" or not tests:
            character = self._next()
            if character == "\\":
                tests.append(self._escape())
            elif self._peek() == "-" and self.text[self._at + 1 : self._at + 2] not in ("]", "", "\\"):
                self._at += 1
                tests.append(_between(character, self._next()))
            else:
                tests.append(_between(character, character))
        self._at += 1
        return lambda c: any(test(c) for test in tests) != negated

    def _peek(self) -> str:
        return self.text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at == len(self.text):
            self._refuse("it ends too early")
        self._at += 1
        return self.text[self._at - 1]


def _between(first: str, last: str) -> _Test:
    return lambda c: first <= c <= last

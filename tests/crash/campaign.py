"""Put every fault at every point of a command, and look at what comes of it.

``python -m tests.crash`` does all of it; test_crash.py takes a part.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from tests.crash import oracle
from tests.crash.disk import after_power_cut
from tests.crash.machine import FILLING, NONE, WRITING, Call, Ended, Fault
from tests.crash.scenarios import Scenario, State, World

ERRORS: Mapping[str, tuple[int, ...]] = {
    "create": (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EDQUOT, errno.EROFS, errno.EMFILE),
    "open": (errno.EIO, errno.EINTR, errno.EROFS),
    "write": (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EDQUOT),
    "fsync": (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EDQUOT),
    "truncate": (errno.EIO, errno.EINTR, errno.ENOSPC),
    "rename": (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT),
    "mkdir": (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT),
    "chmod": (errno.EIO, errno.EROFS, errno.EPERM),
    "flock": (errno.EIO, errno.EINTR, errno.ENOLCK),
    "unlink": (errno.EIO, errno.EROFS),
    "rmdir": (errno.EIO, errno.EROFS),
    "link": (errno.EIO, errno.EROFS),
    "send": (errno.ECONNRESET, errno.EINTR),
}
"""What a call may fail with."""


@dataclass
class Tally:
    """What was tried, and what went wrong."""

    points: int = 0
    kills: int = 0
    cuts: int = 0
    faults: int = 0
    changes: int = 0
    writers: int = 0
    runs: int = 0
    hangs: int = 0
    crashes: int = 0
    bytes_lost: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add what another one has counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Campaign:
    """All faults of one command. ``broken``: a defect to put into df11, to see that it is found."""

    world: World
    scenario: Scenario
    broken: str = ""
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        """Run it undisturbed, with the source as it is and as it will be."""
        self.world.set(State({"work": None}, {}))
        self.scenario.prepare(self.world)
        self.before = self.world.state()
        ended = self._run()
        assert ended.code == 0, ended
        self.calls = ended.calls
        self.tally.points += len(self.points)
        self.result = self.world.state()
        self.results = [self.result]
        left = [
            name for name in self.result.files if oracle.UNFINISHED.fullmatch(name) and name not in self.before.files
        ]
        self._note("undisturbed", [f"{name} was left behind" for name in left])
        assert self._run().code == 0
        self._seen: set[str] = set()
        self._expect(self.result, "a second run")
        self.newer = None
        if self.scenario.change is not None:
            self.world.set(self.before)
            self.scenario.change(self.world)
            ended = self._run()
            assert ended.code == 0, ended
            self.newer = self.world.state()
            self.results.append(self.newer)

    @property
    def points(self) -> list[Call]:
        """The calls before which something may happen. Of many equal writes, the first, the second and the last."""
        found = []
        for _, group in groupby(
            _changing(self.calls), lambda call: (call.kind, call.inode) if call.kind == "write" else call
        ):
            calls = list(group)
            found += calls if len(calls) < 4 else [calls[0], calls[1], calls[-1]]
        return found

    def checks(self) -> Iterator[Callable[[], None]]:
        """Everything that can be tried."""
        for call in self.points:
            self_call = call
            yield lambda call=self_call: self.kill(call.number)
            for error in ERRORS[call.kind]:
                yield lambda call=self_call, error=error: self.fail(call, Fault("fail", call.number, error))
            if call.kind == "write":
                yield lambda call=self_call: self.fail(call, Fault("short", call.number))
            if call.kind in FILLING:
                fault = Fault("fail on", call.number, errno.ENOSPC, FILLING)
                yield lambda call=self_call, fault=fault: self.fail(call, fault)
            if call.kind in WRITING:
                fault = Fault("fail on", call.number, errno.EROFS, WRITING)
                yield lambda call=self_call, fault=fault: self.fail(call, fault)
            changed = self.newer is not None and call.number % 2 == 0
            yield lambda call=self_call, changed=changed: self.two_writers(call.number, changed=changed)
            if self.newer is not None:
                yield lambda call=self_call: self.change_source(call.number)
        yield lambda: self.kill(len(self.calls) + 1)

    def _run(self, fault: Fault = NONE) -> Ended:
        self.tally.runs += 1
        return self.world.machine.run(self.scenario.arguments, fault, broken=self.broken)

    def _note(self, what: str, problems: Sequence[str], ended: Ended | None = None) -> None:
        self.tally.violations += [f"{self.scenario.name}: {what}: {problem}" for problem in problems]
        if ended is not None and any("hung" in problem for problem in problems):
            self.tally.hangs += 1
        self.tally.crashes += sum("crashed" in problem for problem in problems)

    def _look(self, what: str, found: State) -> None:
        problems = oracle.violations(self.world, found, self.before, self.results)
        self._note(what, problems)
        for problem in problems:
            self.tally.bytes_lost += len(self.before.files.get(problem.partition(":")[0]) or b"")

    def kill(self, number: int) -> None:
        """The process ends before a call, and so may the machine."""
        what = self._named("killed", number)
        self.world.set(self.before)
        ended = self._run(Fault("kill", number))
        self.tally.kills += 1
        self._note(what, oracle.bad_end(ended, killed=True), ended)
        state = self.world.state()
        self._settle(what, state)
        for index, files in enumerate(after_power_cut(self.before.files, ended.calls, str(self.world.root))):
            self.tally.cuts += 1
            cut = State(files, state.repositories)
            name = f"{what}, power cut {index + 1}"
            if ended.code == 0:
                differing = oracle.differences(State(self._final(files), state.repositories), self.result)
                self._note(f"{name} after the end", differing)
            self._settle(name, cut)

    def _final(self, files: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
        # Without what only a run that was killed leaves: that it is gone need not be safe.
        mine = [name for name in files if oracle.UNFINISHED.fullmatch(name) and name not in self.before.files]
        return {name: data for name, data in files.items() if name not in mine}

    def fail(self, call: Call, fault: Fault) -> None:
        """A call fails, or does half of what it should; or all of a kind from there on."""
        what = self._named(f"{fault.mode} {errno.errorcode.get(fault.error, '')}", call.number)
        self.world.set(self.before)
        ended = self._run(fault)
        self.tally.faults += 1
        self._note(what, oracle.bad_end(ended, killed=False), ended)
        state = self.world.state()
        if ended.code == 0:
            can_remove = call.kind not in ("unlink", "rmdir") and "unlink" not in fault.kinds
            files = state.files if can_remove else self._final(state.files)
            differing = oracle.differences(State(files, state.repositories), self.result)
            self._note(f"{what}, which it told nobody", differing)
        self._settle(what, state)

    def two_writers(self, number: int, *, changed: bool = False) -> None:
        """While one run waits, another does the same, or with another source."""
        what = self._named("two writers, two sources" if changed else "two writers", number)
        self.world.set(self.before)
        first = self.world.machine.start(self.scenario.arguments, Fault("stop", number), broken=self.broken)
        ended = first.wait()
        if changed and self.scenario.change is not None:
            self.scenario.change(self.world)
        second = self._run()
        self._look(f"{what}, one of which waits", self.world.state())
        if ended is None:
            ended = first.go_on()
        self.tally.writers += 1
        for name, one in (("first", ended), ("second", second)):
            self._note(f"{what}, the {name}", oracle.bad_end(one, killed=False), one)
        if changed:
            self._look(what, self.world.state())
            self._then_newer(what, ended)
            return
        if 0 not in (ended.code, second.code):
            self._note(what, [f"neither ended well: {ended.output} {second.output}"])
        self._settle(what, self.world.state())

    def change_source(self, number: int) -> None:
        """The source changes while a run is under way."""
        assert self.scenario.change is not None
        what = self._named("source changed", number)
        self.world.set(self.before)
        run = self.world.machine.start(self.scenario.arguments, Fault("stop", number), broken=self.broken)
        ended = run.wait()
        self.scenario.change(self.world)
        if ended is None:
            ended = run.go_on()
        self.tally.changes += 1
        self._note(what, oracle.bad_end(ended, killed=False), ended)
        self._look(what, self.world.state())
        self._then_newer(what, ended)

    def _then_newer(self, what: str, before: Ended) -> None:
        # With the source as it is now, the same command ends as it always does with that source.
        assert self.newer is not None
        again = self._run()
        self._note(f"{what}, then run again", oracle.bad_end(again, killed=False), again)
        if again.code == 0 or before.code != 0 or self.scenario.is_kept:
            self._expect(self.newer, f"{what}, then run again", again)

    def _settle(self, what: str, state: State) -> None:
        # The state is one that may be, and the same command leads to the end that it always has.
        key = _key(state)
        if key in self._seen:
            return
        self._seen.add(key)
        self._look(what, state)
        self.world.set(state)
        again = self._run()
        self._expect(self.result, f"{what}, then run again", again)
        is_kept = self.scenario.is_kept or key != _key(self.result)
        if self.newer is not None and self.scenario.change is not None and is_kept:
            self.world.set(state)
            self.scenario.change(self.world)
            again = self._run()
            self._expect(self.newer, f"{what}, then run again with another source", again)

    def _expect(self, wanted: State, what: str, ended: Ended | None = None) -> None:
        if ended is not None and ended.code != 0:
            self._note(what, [f"exit code {ended.code}: {ended.output[-300:]}"], ended)
            return
        self._note(what, oracle.differences(self.world.state(), wanted))

    def _named(self, what: str, number: int) -> str:
        call = self.calls[number - 1] if number <= len(self.calls) else None
        if call is None:
            return f"{what} after the last call"
        path = call.path.removeprefix(f"{self.world.root}/")
        return f"{what} before call {number} ({call.kind} {path})"


_ASKS = re.compile(r"POST .*(/preupload/|/paths-info/|/validate-yaml|/objects/batch)")


def _changing(calls: Sequence[Call]) -> Iterator[Call]:
    # All but the pieces of requests that only ask.
    request = ""
    for call in calls:
        if call.kind == "send":
            request = call.path or request
        if call.kind != "send" or not _ASKS.match(request):
            yield call


def _key(state: State) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(state.files.items()):
        digest.update(repr((name, None if data is None else hashlib.sha256(data).hexdigest())).encode())
    digest.update(repr(sorted((name, kept.branches["main"]) for name, kept in state.repositories.items())).encode())
    digest.update(repr(sorted((name, sorted(kept.objects)) for name, kept in state.repositories.items())).encode())
    return digest.hexdigest()

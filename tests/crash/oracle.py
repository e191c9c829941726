"""What must hold after a fault, whatever it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping

from df11.converter import parquet
from df11.converter.manifest import FILE_NAME, Manifest
from df11.formats import errors
from df11.formats.container import Container
from df11.storage import journal
from tests.crash.machine import Ended
from tests.crash.scenarios import Files, State, World

UNFINISHED = re.compile(r"(.*/)?(\..*\.(partial|download)|\.df11-run)(\.lock)?|work/df11-job-.*")
"""What a killed run may leave: never the name of a file of a model."""
EXIT_CODES = {1, 2, 3, 4, 5, 6, 7}


def violations(world: World, found: State, before: State, results: Collection[State]) -> list[str]:
    """What is wrong with a state in which a run may have ended.

    ``before``: how it began; ``results``: how undisturbed runs end, with the source as it was or has become.
    """
    wrong = []
    for name in sorted({*found.files, *before.files, *(name for one in results for name in one.files)}):
        if name.startswith("source") or name == "job.toml":
            continue
        if problem := _file(name, found.files, before.files, results):
            wrong.append(f"{name}: {problem}")
    if f"target/{FILE_NAME}" in found.files:
        wrong += _manifest(found.files[f"target/{FILE_NAME}"], world, found.files)
    for repository, kept in found.repositories.items():
        wrong += _repository(world, repository, kept.branches["main"], before, results)
    wrong += [f"the Hub: {error.splitlines()[-1]}" for error in world.hub.errors]
    return wrong


def _file(name: str, found: Files, before: Files, results: Collection[State]) -> str | None:
    may_be = [one[name] for one in (before, *(result.files for result in results)) if name in one]
    if name in found and (UNFINISHED.fullmatch(name) or name == f"target/{FILE_NAME}"):
        return None
    if name not in found:
        is_required = name in before and all(name in result.files for result in results)
        return "lost" if is_required else None
    if found[name] is None or found[name] in may_be:
        return None
    return f"neither the old nor the new file ({len(found[name] or b'')} bytes)" if may_be else "nobody's file"


def _manifest(data: bytes | None, world: World, files: Files) -> list[str]:
    # It is about each file that is there, unless the journal of a run that did not end is.
    try:
        manifest = parquet.from_bytes(data or b"", FILE_NAME)
    except errors.Df11Error as error:
        return [str(error)]
    left = world.machine.folder / "journal"
    left.write_bytes(files.get(f"target/{journal.FILE_NAME}") or b"")
    begun = {name for name, marks in journal.read(left)[1].items() if any(mark.of != "begun" for mark in marks)}
    known = {name.removeprefix("target/"): data for name, data in files.items() if data}
    return _differing(manifest, {name: data for name, data in known.items() if name not in begun}, world)


def _differing(manifest: Manifest, files: Mapping[str, bytes], world: World) -> list[str]:
    wrong = []
    for row in manifest.files:
        if row.file not in files:
            continue
        path = world.machine.folder / "container.df11"
        path.write_bytes(files[row.file])
        try:
            with Container(path) as container:
                is_meant = (container.size, container.source.sha256) == (row.bytes, row.source_sha256)
        except errors.Df11Error:
            is_meant = False
        if not is_meant:
            wrong.append(f"the manifest is not about this {row.file}")
    for name, sha256 in manifest.others:
        if name in files and hashlib.sha256(files[name]).hexdigest() != sha256:
            wrong.append(f"the manifest is not about this {name}")
    return wrong


def _repository(world: World, name: str, head: str, before: State, results: Collection[State]) -> list[str]:
    # Every commit since is one that anybody may read.
    wrong = []
    known = set(before.repositories[name].commits) if name in before.repositories else set()
    may_be = {(path, sha256) for one in (before, *results) for path, sha256 in one.heads.get(name, {}).items()}
    repository = world.hub.repository(name)
    for commit in repository.history(head):
        if commit.oid in known or commit.parent is None:
            break
        if any(commit.oid in result.repositories[name].commits for result in results if name in result.repositories):
            continue
        for path, blob in commit.tree.items():
            if path != FILE_NAME and (path, blob.sha256) not in may_be:
                wrong.append(f"{name}: {path} is neither the old nor the new file")
        if FILE_NAME in commit.tree:
            try:
                manifest = parquet.from_bytes(repository.read(FILE_NAME, commit.oid), FILE_NAME)
            except errors.Df11Error as error:
                wrong.append(f"{name}: {error}")
                continue
            rows = {row.file: row.sha256 for row in manifest.files}
            hashes = {path: blob.sha256 for path, blob in commit.tree.items()}
            wrong += [
                f"{name}: the manifest is not about this {path}"
                for path, sha256 in rows.items()
                if path in hashes and hashes[path] != sha256
            ]
    return wrong


def bad_end(ended: Ended, *, killed: bool) -> list[str]:
    """What is wrong with how a run ended: it was killed, or ended well, or said one line."""
    if ended.code is None:
        return ["it hung"]
    if killed and ended.code == -9:
        return []
    told = [line for line in ended.output.splitlines() if line.startswith("df11: ") and "warning" not in line]
    if "Traceback" in ended.output or ended.code == 70:
        return [f"it crashed ({ended.code}): {ended.output[-300:]}"]
    if ended.code == 0:
        return [f"it ended well, but said: {told}"] if told else []
    if ended.code not in EXIT_CODES:
        return [f"exit code {ended.code}: {ended.output[-300:]}"]
    return [] if len(told) == 1 else [f"exit code {ended.code} with {len(told)} lines: {ended.output[-300:]}"]


def differences(found: State, wanted: State) -> list[str]:
    """What a run that was disturbed has left otherwise than one that was not."""
    wrong = []
    for name in sorted({*found.files, *wanted.files}):
        if name not in wanted.files:
            wrong.append(f"{name} was left behind")
        elif name not in found.files:
            wrong.append(f"{name} is missing")
        elif found.files[name] != wanted.files[name]:
            wrong.append(f"{name} differs")
    mine, theirs = found.heads, wanted.heads
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            paths = {path for path, _ in (mine.get(name, {}).items() ^ theirs.get(name, {}).items())}
            wrong.append(f"{name} on the Hub differs: {sorted(paths)}")
    return wrong

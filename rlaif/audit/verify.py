"""Does a run's log still say what it said when it was written? Every digest, and the chain that they make.

In: a run directory, live or done. Out: a `Report` with one finding for each file or line that was changed, cut or
added after it was written, and notes on what could not be checked. Only what is complete is looked at. Rows are read
as a stream: a line is looked for only in a file whose digest doesn't hold.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlaif.constitutions.constitution import Constitution, parse_constitution
from rlaif.constitutions.copies import template_sources
from rlaif.constitutions.derived import FILE as DERIVED_FILE
from rlaif.constitutions.derived import Wordings
from rlaif.constitutions.templates import parse_template
from rlaif.errors import RlaifError, UserError
from rlaif.models import digest_of
from rlaif.records import ConstitutionRef, Event, Plan, Record, stored
from rlaif.rundir.heads import FILE, Head, complete_files, ends_torn, parent_folder, parse_head, read_heads
from rlaif.rundir.store import ROW_DIGEST_BYTES, RunDir, StageDir, file_digest, read_json, read_record, row_digest

_READ = 1 << 20
_NAMED_LINES = 10
"""So many changed lines of a file are named one by one; more are counted."""
_ALIGNED = 5_000
"""Longest stretch of different lines that is compared line with line."""


class Finding(Record):
    """One thing that doesn't hold."""

    file: str
    """In the run directory."""
    line: int | None = None
    """From 1; of a line that is gone, where it stood."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.what}"


class Report(Record):
    """What was checked, and what was found."""

    run: str
    head: str | None
    """The newest, as `16:3f2a…`."""
    noted: str | None
    """What is to be said about the head that was noted elsewhere."""
    stages: int
    rows: int
    heads: int
    texts: int
    """Copies of constitutions."""
    templates: int
    """Copies of a judge's templates, and of the wordings by which contrasts are derived."""
    policies: int
    """Whose weights are on the disk."""
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What could not be checked, and why."""

    @property
    def holds(self) -> bool:
        """Nothing was found."""
        return not self.findings


def verify(
    run: RunDir,
    head: str | None = None,
    progress: Callable[[str], None] = lambda folder: None,
    weights: bool = True,
) -> Report:
    """Checks a run; `head` is one that was noted elsewhere, `progress` is told each folder.

    `weights` reads the policies that are on the disk, which can be larger than all the rest.

    Raises:
        UserError: `head` is none.
    """
    noted = parse_head(head) if head else None
    checking = _Checking(run, progress, weights)
    checking.heads()
    checking.parent()
    checking.folders()
    checking.plans()
    checking.texts()
    about = checking.noted(*noted) if noted else None
    return Report(
        run=str(run.path),
        head=checking.chain[-1].name if checking.chain else None,
        noted=about,
        heads=len(checking.chain),
        findings=tuple(checking.findings),
        notes=tuple(checking.notes),
        **checking.counts,
    )


class _Checking:
    """One verification on its way."""

    def __init__(self, run: RunDir, progress: Callable[[str], None], weights: bool):
        self.run = run
        self.progress = progress
        self.weights = weights
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.counts = dict.fromkeys(("stages", "rows", "texts", "templates", "policies"), 0)
        self.chain: list[Head] = []
        self.line_of: list[int] = []
        """Of each head of the chain, its line."""
        self.covered: set[str] = set()
        """Files that some head covers."""
        self.unread: list[range] = []
        """Iterations whose head can't be read."""
        self.iterations = run.iterations()
        self.missing: set[str] = set()
        """Folders that are gone as a whole: one finding each is enough."""
        self.wrong: set[str] = set()
        """Files whose own digest doesn't hold."""

    def found(self, file: str | Path, what: str, line: int | None = None) -> None:
        name = str(file.relative_to(self.run.path)) if isinstance(file, Path) else file
        self.wrong.add(name)
        finding = Finding(file=name, line=line, what=what)
        if finding not in self.findings:
            self.findings.append(finding)

    # Heads.

    def heads(self) -> None:
        """The chain of heads, and every file that they cover."""
        lines = read_heads(self.run.path)
        torn: list[int] = []
        """Lines before the next head that are none."""
        for number, head in enumerate(lines, 1):
            if head is None:
                torn.append(number)
                continue
            before = self.chain[-1] if self.chain else None
            if head.previous != (before.head if before else None):
                if torn:
                    self._unreadable(torn, before, head.iteration)
                else:
                    self.found(FILE, f"the link to the head before it doesn't hold: heads were {_LOST}", number)
            # Lines that a link goes past were torn by a kill, and the head that follows covers what theirs would have.
            torn = []
            if head.computed() != head.head:
                self.found(FILE, "the head doesn't follow from its line: it was changed", number)
            self.chain.append(head)
            self.line_of.append(number)
        if torn:
            self._unreadable(torn, self.chain[-1] if self.chain else None, max(self.iterations, default=-1))
        if ends_torn(self.run.path):
            self.notes.append(
                f"{FILE}:{len(lines) + 1} is a torn line, by a kill or by a cut: it covers nothing, and the next head "
                "of the run will cover what it would have"
            )
        if not self.chain:
            self.notes.append(
                f"no {FILE}: the run is older than heads, or no iteration is done. Whether plan.json, metrics.json, "
                "events.jsonl, prompts and meta files are as they were written can't be told"
            )
            self._told()
            return
        for number, head in zip(self.line_of, self.chain, strict=True):
            self.covered |= head.files.keys()
            for name, sha256 in head.files.items():
                self._covered(name, sha256, number)
        self._changing(self.chain[-1])
        for name in {n for head in self.chain for n in head.growing}:
            self._growing(name)
        self._uncovered()
        self._told()

    def _unreadable(self, lines: list[int], before: Head | None, last: int) -> None:
        """Lines that were heads, of iterations up to `last`: what they covered can't be told any more."""
        for number in lines:
            self.found(FILE, "can't be read: it was damaged after it was written, and what it covered isn't checked",
                       number)  # fmt: skip
        self.unread.append(range(before.iteration + 1 if before else 0, last + 1))

    def _covered(self, name: str, sha256: str, number: int) -> None:
        path = self.run.path / name
        folder = str(Path(name).parent)
        if not path.parent.exists():
            if folder not in self.missing:
                self.missing.add(folder)
                self.found(folder, f"the folder is gone; {FILE}:{number} covers it")
        elif not path.exists():
            self.found(name, f"is gone; {FILE}:{number} covers it")
        elif file_digest(path) != sha256:
            self.found(name, f"was changed after {FILE}:{number} was written")

    def _changing(self, newest: Head) -> None:
        """Files that a resumed run may write anew."""
        for name, sha256 in newest.changing.items():
            path = self.run.path / name
            if not path.exists():
                self.found(name, "is gone")
            elif file_digest(path) != sha256:
                if self._resumed_since(newest):
                    self.notes.append(
                        f"{name} is not what {FILE}:{self.line_of[-1]} covers; a resume was noted since, which may "
                        "write it anew: whether it was changed by hand can't be told"
                    )
                    continue
                self.found(name, f"was changed after {FILE}:{self.line_of[-1]} was written, and no run went on since")

    def _resumed_since(self, head: Head) -> bool:
        grown, path = head.growing.get("events.jsonl"), self.run.path / "events.jsonl"
        if grown is None or not path.exists():
            return False
        with path.open("rb") as f:
            f.seek(grown.size)
            return any(kind in line for line in f for kind in _WRITES_HEADER)

    def _growing(self, name: str) -> None:
        """A file that only grows: what the newest head covers is its beginning still."""
        path = self.run.path / name
        covered = [head.growing[name] for head in self.chain if name in head.growing]
        if not path.exists():
            self.found(name, "is gone")
            return
        sha, left = hashlib.sha256(), covered[-1].size
        with path.open("rb") as f:
            while left and (part := f.read(min(left, _READ))):
                sha.update(part)
                left -= len(part)
        if left or sha.hexdigest() != covered[-1].sha256:
            try:
                then = b"".join(base64.b64decode(g.row_digests, validate=True) for g in covered)
            except ValueError:
                then = b""
            self._lines(path, then, grows=True)

    def _uncovered(self) -> None:
        """Files of finished iterations and their evaluations that no head covers came later."""
        known = self.covered
        newest = self.chain[-1].iteration
        # An iteration's head covers the evaluation after it too, and the first one that of the base policy.
        unread = {("iterations", k) for r in self.unread for k in r}
        unread |= {("evaluations", k) for r in self.unread for k in (*r, r.stop)}
        under_way = self.run.iteration(newest + 1).path.exists()
        for name in complete_files(self.run.path, newest):
            kind, _, rest = name.partition("/")
            if name in known or kind not in ("iterations", "evaluations"):
                continue
            # An iteration that isn't done evaluates the policy before it, when the text changed, and the one after it.
            number = rest.partition("/")[0]
            if kind == "evaluations" and under_way and number.isdigit() and int(number) > newest:
                continue
            if number.isdigit() and (kind, int(number)) in unread:
                continue
            self.found(name, f"was added after iteration {newest + 1} was done: no line of {FILE} covers it")

    def _told(self) -> None:
        """Events tell of iterations and heads that must be here."""
        known = {head.name for head in self.chain}
        newest = max(self.iterations, default=-1)
        ahead = int(((self.run.header.get("job") or {}).get("pipeline") or {}).get("staleness", 0))
        for number, event in self._events():
            if (head := event.data.get("head")) and head not in known and not self._was_unread(head):
                self.found(
                    "events.jsonl", f"tells of head {head}, and {FILE} has none such: heads were {_LOST}", number
                )
            if event.iteration is None or self.run.iteration(event.iteration).path.exists():
                continue
            # A text that doesn't parse is told before the folder of its iteration is made. A branch has what was told
            # of iterations that its parent judged ahead.
            told = {"alarm": max(ahead, 1), "judging_interrupted": ahead}.get(event.kind, 0)
            if event.iteration > newest + told:
                self.found(
                    "events.jsonl", f"tells of iteration {event.iteration + 1}, whose folder is gone (a removed tail)",
                    number,
                )  # fmt: skip

    def _was_unread(self, head: str) -> bool:
        """Whether a head, as `16:3f2a…`, can be that of a line that can't be read."""
        done = str(head).partition(":")[0]
        return done.isdigit() and any(r.start <= int(done) <= r.stop for r in self.unread)

    def _events(self) -> Iterator[tuple[int, Event]]:
        path = self.run.path / "events.jsonl"
        for number, line in enumerate(path.open("rb") if path.exists() else (), 1):
            try:
                yield number, stored(Event, line)
            except ValidationError:
                continue

    def parent(self) -> None:
        """Of a branch: the head that it went on from is in its own chain, and in its parent's, if that is here."""
        if (parent := self.run.parent) is None:
            return
        here = {head.name for head in self.chain}
        if parent.head is not None and parent.head not in here and not self._was_unread(parent.head):
            self.found("run.json", f"names head {parent.head} of {parent.run}, and {FILE} has none such")
        past = f"the first {parent.iterations} iterations are those of {parent.run}"
        if parent.head is None:
            self.notes.append(f"{past}, which had noted no head then: they are covered since the run went on from it")
        elif parent_folder(self.run) is None:
            self.notes.append(
                f"{past}, which isn't here with head {parent.head}: only this run's own files are checked"
            )

    def noted(self, done: int | None, digits: str) -> str:
        """What the noted head says about this run."""
        for number, head in enumerate(self.chain):
            if head.head.startswith(digits):
                here, later = head.iteration + 1, len(self.chain) - number - 1
                if done not in (None, here):
                    what = f"the noted head is that after iteration {here} here, but was noted after iteration {done}"
                    self.found(FILE, what)
                    return what
                follow = "it is the newest" if not later else f"{later} more follow"
                return f"it is the head after iteration {here}; {follow}"
        newest = self.chain[-1].iteration + 1 if self.chain else 0
        if not self.chain:
            what = f"there is no {FILE} that could hold the noted head"
        elif done is None:
            what = (
                f"the noted head is none of this run's (the newest is after iteration {newest}): its tail was removed, "
                "or it was written anew, or the head is another run's"
            )
        elif done > newest:
            what = (
                f"the noted head is after iteration {done}, the newest here after iteration {newest}: a tail was "
                "removed, or the head is another run's"
            )
        else:
            what = f"the noted head after iteration {done} is none of this run's: what is up to there was written anew"
        self.found(FILE, what)
        return what

    # Stages.

    def folders(self) -> None:
        """Every stage's rows, meta file and inputs."""
        folders = [*map(self.run.iteration, self.iterations), *map(self.run.evaluation, self.run.evaluations())]
        if self.iterations != list(range(len(self.iterations))):
            gaps = sorted(set(range(self.iterations[-1])) - set(self.iterations))
            for k in gaps:
                if f"iterations/{k:04d}" not in self.missing:
                    self.found(f"iterations/{k:04d}", "the folder is gone")
        unnamed = 0
        for folder in folders:
            self.progress(str(folder.path.relative_to(self.run.path)))
            metas = {}
            for path in sorted(folder.path.glob("*.meta.json")):
                stage = path.name.removesuffix(".meta.json")
                meta = self._meta(path)
                if meta is None or self._renamed_next(folder, stage):
                    continue
                metas[stage] = meta
                unnamed += "row_digests" not in meta
                self._stage(folder, stage, meta)
            for path in sorted(folder.path.glob("*.jsonl")):
                if not (folder.path / f"{path.stem}.meta.json").exists():
                    self.found(path, "has no meta file: it was added, or its meta file was removed")
            self._inputs(folder, metas)
        if unnamed:
            self.notes.append(
                f"{unnamed} stages were written without digests of their rows (an older rlaif): if such a file was "
                "changed, no line can be named"
            )

    def _renamed_next(self, folder: StageDir, stage: str) -> bool:
        """Whether the stage is between its meta file and its last rename, as a run that is being written has it."""
        partial = folder.path / f"{stage}.jsonl.partial"
        if folder.is_complete(stage):
            if partial.exists():
                self.found(partial, f"stands beside the complete {stage}.jsonl: it was added")
            return False
        covered = str((folder.path / f"{stage}.meta.json").relative_to(self.run.path)) in self.covered
        return not covered and partial.exists()

    def _meta(self, path: Path) -> dict[str, Any] | None:
        try:
            meta = read_json(path)
            if not isinstance(meta, dict) or not {"sha256", "rows", "inputs"} <= set(meta):
                raise ValueError("it holds no digest")
            if not isinstance(meta["inputs"], dict):
                raise ValueError("its inputs are none")
            base64.b64decode(meta.get("row_digests", ""), validate=True)
        except FileNotFoundError:  # `folders` says so
            return None
        except OSError as e:
            self.found(path, f"can't be read ({e.strerror})")
            return None
        except (RlaifError, ValueError, TypeError) as e:
            self.found(path, f"is no meta file any more ({str(e).removeprefix(f'{path}:')})")
            return None
        return meta

    def _stage(self, folder: StageDir, stage: str, meta: dict[str, Any]) -> None:
        path = folder.path / f"{stage}.jsonl"
        if not path.exists():
            self.found(path, "is gone; its meta file is there")
            return
        self.counts["stages"] += 1
        sha, rows = hashlib.sha256(), 0
        with path.open("rb") as f:
            while part := f.read(_READ):
                sha.update(part)
                rows += part.count(b"\n")
        self.counts["rows"] += rows
        if sha.hexdigest() == meta["sha256"]:
            if rows != meta["rows"]:
                self.found(path, f"has {rows} rows, and its meta file says {meta['rows']}: the meta file was changed")
        elif "row_digests" in meta:
            self._lines(path, base64.b64decode(meta["row_digests"]))
        else:
            self.found(path, f"was changed after it was written ({rows} rows, then {meta['rows']}; no digests of rows)")

    def _inputs(self, folder: StageDir, metas: dict[str, dict[str, Any]]) -> None:
        for stage, meta in metas.items():
            for name, sha256 in meta["inputs"].items():
                if name not in metas:
                    for file in (f"{name}.meta.json", f"{name}.jsonl"):
                        if not (folder.path / file).exists():
                            self.found(folder.path / file, f"is gone, and {stage} was made from it")
                elif metas[name]["sha256"] != sha256:
                    self.found(
                        folder.path / f"{name}.jsonl",
                        f"isn't what {stage} was made from: it was written anew, its meta file too",
                    )

    def _lines(self, path: Path, then: bytes, grows: bool = False) -> None:
        """Finds the lines that differ from those of the digests, and says of each what happened to it."""
        with path.open("rb") as f:
            now = b"".join(map(row_digest, f))
        before = [then[i : i + ROW_DIGEST_BYTES] for i in range(0, len(then), ROW_DIGEST_BYTES)]
        after = [now[i : i + ROW_DIGEST_BYTES] for i in range(0, len(now), ROW_DIGEST_BYTES)]
        changes = line_changes(before, after)
        if grows:  # lines after the last one that is covered are its growth
            changes = [c for c in changes if (c[0], c[2]) != ("added", len(after))]
        if not changes:
            self.found(path, "was changed after it was written, no line of it by itself (its meta file was changed?)")
        for what, start, end in changes:
            lines = range(start, end)
            if what == "changed" and len(lines) <= _NAMED_LINES:
                for line in lines:
                    self.found(path, "was changed after it was written", line + 1)
                continue
            many = f"lines {start + 1} to {end}" if len(lines) > 1 else "the line"
            verb = "were" if len(lines) > 1 else "was"
            where = " (it stood here)" if what == "cut" else ""
            self.found(path, f"{many} {verb} {what} after it was written{where}", start + 1)

    # What plans name: policies and texts.

    def plans(self) -> None:
        """The policies' digests from update to plan, and the weights that are still there."""
        policy, after = self.run.header.get("models", {}).get("policy"), 0
        known: list[tuple[str | None, int]] = []
        """The policy after no iteration, after one, and so on, as far as they go; and which one made it."""
        for k in self.iterations:
            here = self.run.iteration(k)
            known.append((policy, after))
            plan = self._plan(k)
            if plan is not None:
                self._sampled_from(here.path / "plan.json", plan, known)
            if not here.is_complete("updates"):
                continue
            path = here.path / "updates.meta.json"
            if self._meta(path) is None:
                policy = None
                continue
            try:
                made = here.policy_made()
            except RlaifError as e:
                self.found(path, str(e).removeprefix(f"{path}: "))
                policy = None
                continue
            if made is not None:
                policy, after = made, k + 1
                self._weights(here.path / "policy", policy)

    def _sampled_from(self, path: Path, plan: Plan, known: Sequence[tuple[str | None, int]]) -> None:
        """Whether a plan's policy is the one after so many iterations; `known` are those up to its own beginning."""
        if not 0 <= plan.staleness < len(known):
            self.found(path, f"names a policy of {plan.staleness} iterations before, and there are fewer")
            return
        policy, after = known[-1 - plan.staleness]
        if policy is not None and plan.policy.digest != policy:
            made = f"iteration {after} made {policy}" if after else f"run.json the base policy {policy}"
            self.found(path, f"names policy {plan.policy.digest}, and {made}")

    def _plan(self, k: int) -> Plan | None:
        path = self.run.iteration(k).path / "plan.json"
        if not path.exists():
            if str(path.relative_to(self.run.path)) not in self.wrong and any(path.parent.glob("*.jsonl")):
                self.found(path, "is gone")
            return None
        try:
            return read_record(path, Plan)
        except RlaifError:  # no JSON, no UTF-8, no plan
            self.found(path, "is no plan any more: it was damaged after it was written")
            return None

    def _weights(self, folder: Path, expected: str | None) -> None:
        try:
            if not self.weights or not any(folder.glob("*.safetensors")):
                return  # pruned
            self.progress(str(folder.relative_to(self.run.path)))
            found = digest_of(folder)
        except (OSError, UserError):
            return  # pruned just now
        self.counts["policies"] += 1
        if found != expected:
            self.found(folder, f"its weights have digest {found}, and updates.meta.json says {expected}")

    def texts(self) -> None:
        """The copies of texts, templates and wordings that plans name: their hash follows from their content."""
        constitutions: dict[str, ConstitutionRef] = {}
        templates: dict[str, str] = {}
        derived: set[str] = set()
        for k in self.iterations:
            if not (self.run.iteration(k).path / "plan.json").exists() or (plan := self._plan(k)) is None:
                continue
            for text in (plan, plan.in_force):
                constitutions[text.constitution.hash] = text.constitution
                templates |= {text_hash: name for name, text_hash in text.templates.items()}
                derived.update(text.derived.values())
        self.counts |= {"texts": len(constitutions), "templates": len({*templates, *derived})}
        for text_hash, ref in constitutions.items():
            folder = self.run.path / "constitutions" / text_hash
            self._text(folder / "constitution.json", text_hash, lambda p: read_record(p, Constitution).hash)
            self._text(
                folder / "source.yaml",
                text_hash,
                lambda p, ref=ref: parse_constitution(p.read_text(), ref.name, ref.version, str(p)).hash,  # type: ignore[misc]
            )
        for text_hash, name in templates.items():
            folder = self.run.path / "constitutions" / text_hash
            self._text(folder, text_hash, lambda p, name=name: _template_hash(p, name))  # type: ignore[misc]
        for text_hash in sorted(derived):
            copy = self.run.path / "constitutions" / text_hash / DERIVED_FILE
            self._text(copy, text_hash, lambda p: read_record(p, Wordings).hash)
        named = {*constitutions, *templates, *derived}
        named.update(Path(name).parts[1] for name in self.covered if name.startswith(_TEXTS))
        for folder in sorted(p for p in (self.run.path / "constitutions").glob("*") if p.is_dir()):
            if folder.name not in named and folder.suffix != ".partial":
                self.notes.append(
                    f"{_TEXTS}{folder.name} is named by no plan and no head: it was added, or copied for an iteration "
                    "that hasn't begun"
                )

    def _text(self, path: Path, text_hash: str, hash_of: Callable[[Path], str]) -> None:
        if not path.exists():
            self.found(path, "is gone")
            return
        try:
            found = hash_of(path)
        except (RlaifError, ValidationError, KeyError, UnicodeDecodeError) as e:
            self.found(path, f"was changed after it was written: it doesn't parse ({str(e).splitlines()[0]})")
            return
        if found != text_hash:
            self.found(
                path, f"was changed after it was written: its hash is {found}, its folder's name is the one it had"
            )


_WRITES_HEADER = tuple(f'"kind":"{kind}"'.encode() for kind in ("resumed", "job_changed", "schema_raised"))
"""Events of a run that goes on, which may write run.json anew."""
_TEXTS = "constitutions/"
_LOST = "changed, cut or added"


def _template_hash(folder: Path, name: str) -> str:
    sources = template_sources(folder)
    return parse_template(name, sources, str(folder)).hash


def line_changes(before: list[bytes], after: list[bytes]) -> list[tuple[str, int, int]]:
    """What happened to the lines with these digests: ("changed" | "cut" | "added", from, to), from 0.

    Lines that were changed or added are counted as they stand now, those that were cut as they stood.
    """
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    in_place = _runs([start + i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b])
    aligned = _aligned(old, new, start)
    if len(old) == len(new) and _lines_of(in_place) <= _lines_of(aligned):
        return in_place
    return aligned


def _aligned(old: list[bytes], new: list[bytes], start: int) -> list[tuple[str, int, int]]:
    """The changes between two stretches that begin at line `start`, where lines may have come and gone."""
    blocks: list[tuple[str, int, int, int, int]] = [("replace", 0, len(old), 0, len(new))]
    if max(len(old), len(new)) <= _ALIGNED:
        blocks = [*difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()]
    changes = []
    for tag, a, b, c, d in blocks:
        both = 0 if tag == "equal" else min(b - a, d - c)
        changes.append(("changed", start + c, start + c + both))
        if tag != "equal":
            changes.append(("cut", start + a + both, start + b))
            changes.append(("added", start + c + both, start + d))
    return [c for c in changes if c[1] < c[2]]


def _lines_of(changes: list[tuple[str, int, int]]) -> int:
    return sum(end - start for _, start, end in changes)


def _runs(lines: list[int]) -> list[tuple[str, int, int]]:
    """Line numbers as runs of neighbours."""
    out: list[tuple[str, int, int]] = []
    for line in lines:
        if out and out[-1][2] == line:
            out[-1] = ("changed", out[-1][1], line + 1)
        else:
            out.append(("changed", line, line + 1))
    return out

"""Which policy the sampler and the learner hold, how it gets to them, and whether both hold the same one."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlaif.errors import RlaifError, UserError
from rlaif.loop.gaps import WRONG, decoding_gap, to_score_again, weights_gap
from rlaif.records import Completion, DecodingGap, Plan, PolicyVersion, TokenSequence, WeightsGap
from rlaif.rundir.checkpoints import new_optimizer, policy_dir, state_dir, superfluous
from rlaif.rundir.store import StageDir, replace_dir
from rlaif.workers.weights import WeightsRef

if TYPE_CHECKING:
    from rlaif.loop.running import Running


class _Export(NamedTuple):
    """In what precision the sampler gets a policy, and whether it has to be written in it first."""

    precision: str
    anew: bool


@dataclass
class _Held:
    """What sampler and learner hold, whoever asks."""

    sampler_has: str | None = None
    """Digest of the policy in the sampler; None until something was loaded: it starts with the base policy."""
    learner_at: int | None = None
    """Iterations that the learner has behind it; None until that is known."""
    fixed: list[TokenSequence] = field(default_factory=list)
    """Texts that weights are compared by; made once."""
    gap: tuple[str, WeightsGap] | None = None
    """Of the policy with that digest."""
    read: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    """Digest of a policy → log p of the fixed texts by the learner when it held that one, where it will have gone on
    before somebody asks (`pipeline.staleness`), or will rest (`device: shared`)."""
    exports_in: str | None = None
    copy: Path | None = None
    """A copy that was written for the sampler alone, as long as that holds it: whoever takes the place of a replica
    that died reads it again."""


class HandOver:
    """Brings sampler and learner to the policy that an iteration starts from, and compares them."""

    def __init__(self, run: Running, held: _Held | None = None) -> None:
        self._run = run
        self._held = held or _Held()

    def seen_by(self, run: Running) -> HandOver:
        """The same for another view of the run, which has its own way to the same workers."""
        return HandOver(run, self._held)

    @property
    def sampler_has(self) -> str | None:
        """Digest of the policy in the sampler; None: the base policy, nothing was loaded yet."""
        return self._held.sampler_has

    @sampler_has.setter
    def sampler_has(self, digest: str) -> None:
        self._held.sampler_has = digest

    def policy_before(self, k: int) -> tuple[PolicyVersion, WeightsRef]:
        """The policy that iteration k samples from, and where its weights are."""
        run = self._run
        for i in range(k - 1, -1, -1):
            if (made := run.dir.iteration(i).policy_made()) is not None:
                weights = WeightsRef(digest=made, path=run.dir.iteration(i).path / "policy")
                return PolicyVersion(iteration=i + 1, digest=made), weights
        return PolicyVersion(iteration=0, digest=run.base.digest), run.base

    def policy_for(self, k: int, newest: int) -> tuple[PolicyVersion, int] | None:
        """The policy that iteration k is to sample from, by `pipeline.staleness`, and how many iterations lie between.
        Where that one isn't kept, since the run asked for less before, the oldest that is, if it has `newest`
        iterations behind it at most; None where there is none yet."""
        for behind in range(max(k - self._run.job.pipeline.staleness, 0), newest + 1):
            version, weights = self.policy_before(behind)
            kept = not version.iteration or weights.path.is_dir()
            if behind == k or (kept and not self._export_of(version).anew):
                return version, k - behind
        return None

    def reference_at_change(self, k: int) -> WeightsRef | None:
        """The policy that the text of iteration k came into force with (`learner.reference: at_change`); None: the
        untrained one."""
        text, first = self._run.dir.plan(k).in_force.constitution.hash, k
        while first and self._run.dir.plan(first - 1).in_force.constitution.hash == text:
            first -= 1
        version, weights = self.policy_before(first)
        return weights if version.iteration else None

    def check_reference(self, k: int) -> None:
        """Before anything is sampled: the reference that iteration k's update needs is there.

        Raises:
            UserError: it isn't: a branch asks for it whose parent didn't keep it.
        """
        reference = self.reference_at_change(k) if self._run.job.learner.reference == "at_change" else None
        if reference is not None and not reference.path.is_dir():
            raise UserError(
                f"learner.reference=at_change: the policy that the text in force began with isn't kept "
                f"({reference.path}); restore it, or branch with learner.reference=base or previous"
            )

    def load_sampler(self, k: int, stale: bool = False) -> None:
        """Gives the sampler the policy after k iterations, and compares it with the learner's; where it is `stale`,
        with what the learner said when it held that one.

        Raises:
            UserError: the policy's files are gone.
            RlaifError: the sampler doesn't hold it after all.
        """
        self._run.sampler.ready()  # who is ahead may be changing what it holds
        version, weights = self.policy_before(k)
        has = self.sampler_has or self._run.base.digest
        if has != version.digest:
            weights.folder()  # gone, they are missed before a worker misses them
            before, self._held.copy = self._held.copy, None
            given = self._rounded(k, version, weights) if self._export_of(version).anew else weights
            self._run.sampler.tell("load", weights=given)
            _remove(before)
        self.sampler_has = version.digest
        self._compare(k, version, stale)

    def load_learner(self, k: int) -> None:
        """Brings the learner to the state before iteration k, unless it is there already."""
        updated = [i for i in range(k) if self._run.dir.iteration(i).policy_made() is not None]
        behind = updated[-1] + 1 if updated else 0
        if self._held.learner_at == behind:
            return
        if behind:
            policy, state = self.policy_before(behind)[1], self._state(behind - 1)
            if (steps := new_optimizer(state)) is not None:
                self._run.learner.call("start", policy=policy, global_step=steps)
            else:
                self._run.learner.call("load", state=WeightsRef(digest=policy.digest, path=state))
        self._held.learner_at = behind

    def learner_moves(self) -> None:
        """An update begins: until it is committed, the learner's weights belong to no version."""
        self._held.learner_at = None

    def commit(self, k: int, policy: Path) -> dict[str, Any]:
        """Writes the learner's state and the policy that iteration k made, each with one rename; for the meta file."""
        run, state = self._run, self._state(k)
        partial = {folder: folder.with_name(folder.name + ".partial") for folder in (state, policy)}
        for folder in partial.values():
            shutil.rmtree(folder, ignore_errors=True)
        made: WeightsRef = run.learner.call("save", state_dir=partial[state], policy_dir=partial[policy])
        replace_dir(partial[policy], policy)
        replace_dir(partial[state], state)
        self._held.learner_at = k + 1
        noted: dict[str, Any] = {"policy_digest": made.digest, "exported": self._exports_in()}
        if run.job.pipeline.staleness or run.job.device:
            noted["fixed_texts"] = self._read_by_learner(made.digest)
        return noted

    def forget_copy(self) -> None:
        """Nobody samples any more."""
        _remove(self._held.copy)
        self._held.copy = None

    def prune(self, k: int) -> None:
        """After iteration k, removes the checkpoints that `keep_checkpoints` doesn't name, and tells it before: each
        policy has the size of the model, each learner's state some six times that. Reference policies stay: of this
        iteration, and of those that a branch or a rollback may go on from."""
        run = self._run
        gone = superfluous(run.dir, run.job.keep_checkpoints, k + 1)
        sampled_from = self._sampled_from(k)
        rounded = {i for i in sampled_from if self.needs_learner(i + 1)}
        gone = gone._replace(policies=gone.policies - sampled_from, states=gone.states - rounded)
        if run.job.learner.reference == "at_change" and gone.policies:
            behind = [i for i in range(k) if self._state(i).is_dir() and i not in gone.states]
            needed = {found.path for i in (*behind, k) if (found := self.reference_at_change(i)) is not None}
            gone = gone._replace(policies=frozenset(i for i in gone.policies if policy_dir(run.dir, i) not in needed))
        parts = [("policies", gone.policies), ("learner's states", gone.states)]
        named = [f"{what} after {', '.join(str(i + 1) for i in sorted(of))}" for what, of in parts if of]
        # A killed attempt at this iteration told it of all, and removed some.
        if named and not any(e.kind == "pruned" and e.iteration == k for e in run.dir.events()):
            data = {"policies": sorted(gone.policies), "states": sorted(gone.states)}
            run.dir.event("pruned", f"removed (keep_checkpoints): {'; '.join(named)}", k, **data)
        for pattern in ("learner/*.partial", "iterations/*/policy.partial"):  # what a killed attempt left
            for left in run.dir.path.glob(pattern):
                if left != self._held.copy:
                    shutil.rmtree(left)
        for folder in (*(policy_dir(run.dir, i) for i in gone.policies), *(self._state(i) for i in gone.states)):
            going = folder.with_name(f"{folder.name}.partial")
            os.replace(folder, going)  # so that what has a checkpoint's name is whole
            shutil.rmtree(going)

    def _sampled_from(self, k: int) -> set[int]:
        """Iterations up to k that made a policy which a later one samples from, or which the sampler holds still: that
        of iteration k, unless it was evaluated since. Whoever takes the place of a replica that dies reads it again."""
        run = self._run
        begun = [j for j in run.dir.iterations() if j > k and (run.dir.iteration(j).path / "plan.json").exists()]
        behind = {j - run.dir.plan(j).staleness for j in begun}
        behind |= {*range(max(k + 1 - run.job.pipeline.staleness, 0), k + 2)}
        if not (plan := run.dir.plan(k)).evaluate:
            behind.add(k - plan.staleness)
        return {self.policy_before(n)[0].iteration - 1 for n in behind if n <= k + 1}

    # ---- do both hold the same policy?

    def needs_learner(self, k: int) -> bool:
        """Whether the sampler can't be given the policy after k iterations without the learner's help: then nobody does
        so while that may be training."""
        return self._export_of(self.policy_before(k)[0]).anew

    def look_ahead(self, k: int) -> None:
        """Before an iteration is begun that samples from the policy after k iterations, or a later one, while the
        learner goes on: notes what the learner says of that one, if it still holds it or is to hold it now."""
        version, _ = self.policy_before(k)
        self._exports_in()
        if self._noted_by_learner(version) is None:
            self.load_learner(k)
            self._read_by_learner(version.digest)

    def gap_noted(self) -> dict[str, Any]:
        """For the meta file of what was just sampled."""
        return {"weights_gap": self._held.gap[1].model_dump(mode="json")} if self._held.gap else {}

    def score_again(self, plan: Plan, sampled: list[Completion]) -> dict[str, Any]:
        """Some of what was just sampled, scored by the learner, or where that has gone on by the sampler: it reads the
        fixed texts in one pass, and they say nothing about its way of decoding. For the meta file."""
        run = self._run
        some = to_score_again(sampled, seed=run.job.seed * 1_000_003 + plan.iteration)
        if not some:  # an engine that records no log p
            return {}
        if not plan.staleness:
            self.load_learner(plan.iteration)
        scorer = run.sampler if plan.staleness else run.learner
        texts = [TokenSequence(prompt_token_ids=c.prompt_token_ids, token_ids=c.token_ids) for c in some]
        gap = decoding_gap(some, scorer.call("logprobs", sequences=texts))
        by = {"scored_by": "sampler"} if plan.staleness else {}
        return {"decoding_gap": gap.model_copy(update=by).model_dump(mode="json")}

    def _fixed_texts(self) -> list[TokenSequence]:
        """None for a tokenizer that knows no word of the prompts."""
        if not self._held.fixed:
            self._held.fixed = self._run.sampler.call("sequences_of", prompts=self._run.held_out)
        return self._held.fixed

    def _read_by_learner(self, digest: str) -> list[tuple[float, ...]]:
        """What the learner says of the fixed texts while it holds a policy."""
        if texts := self._fixed_texts():
            self._held.read[digest] = self._run.learner.call("logprobs", sequences=texts)
        return self._held.read.get(digest, [])

    def _noted_by_learner(self, version: PolicyVersion) -> list[tuple[float, ...]] | None:
        """The same of a policy that it held once; None where that wasn't noted."""
        if version.digest not in self._held.read and version.iteration:
            noted = self._run.dir.iteration(version.iteration - 1).meta("updates").get("fixed_texts")
            if noted and len(noted) == len(self._fixed_texts()):
                self._held.read[version.digest] = [tuple(row) for row in noted]
        return self._held.read.get(version.digest)

    def _exports_in(self) -> str:
        """What the learner writes policies in.

        Raises:
            UserError: that is fp32, and a sampler on another machine computes in bf16: it would round to the nearest.
        """
        if self._held.exports_in is None:
            written = str(self._run.learner.call("exports_in"))
            # On one machine `auto` is one precision; a learner of the user's own may write what it likes.
            if self._run.job.cluster and self._run.job.sampling.precision == "auto" and written == "fp32":
                read = [str(computes_in) for computes_in in self._run.sampler.each("computes_in")]
                if any(computes_in.endswith(" bf16") for computes_in in read):
                    raise UserError(
                        "sampling.precision: auto is fp32 where the learner is and bf16 where a sampler is; their "
                        "machines differ, so say which: sampling.precision: fp32"
                    )
            self._held.exports_in = written
        return self._held.exports_in

    def _compare(self, k: int, version: PolicyVersion, stale: bool) -> None:
        """After every load, and before the first sample: do sampler and learner hold the same policy?

        Raises:
            RlaifError: they plainly don't; whatever was sampled would be another model's.
        """
        if self._held.gap is not None and self._held.gap[0] == version.digest:
            return
        run = self._run
        theirs = self._noted_by_learner(version) if stale or run.job.device else None
        if stale and theirs is None:  # the setting was raised since, by more than one
            self._held.gap = None
            return
        if theirs is None:
            self.load_learner(k)
        if not (texts := self._fixed_texts()):
            return
        if theirs is None:
            theirs = run.learner.call("logprobs", sequences=texts)
        self._exports_in()  # refused before anything is sampled
        computes_in, exported = run.sampler.call("computes_in"), self._export_of(version).precision
        each = run.sampler.each("logprobs", sequences=texts)  # one that missed the weights would spoil its share
        gap = max((weights_gap(ours, theirs, computes_in, exported) for ours in each), key=lambda gap: gap.typical)
        if gap.typical > WRONG:
            raise RlaifError(
                f"the sampler ({gap.sampler}) doesn't hold the policy that is trained: log-probabilities of fixed "
                f"texts differ by {gap.typical:.2f} nats a token. `rlaif doctor --deep {run.job.policy.model}` says "
                "where it happens; sampling.engine: transformers may be safe"
            )
        self._held.gap = (version.digest, gap)

    def _export_of(self, version: PolicyVersion) -> _Export:
        if not version.iteration:
            return _Export("as given", anew=False)
        # What it was written in then: this process may compute in something else.
        written = self._run.dir.iteration(version.iteration - 1).meta("updates").get("exported", "bf16")
        anew = written == "fp32" and self._exports_in() == "bf16"
        return _Export("bf16" if anew and self._has_state(version) else written, anew)

    def _rounded(self, k: int, version: PolicyVersion, weights: WeightsRef) -> WeightsRef:
        """For a bf16 sampler, a policy that was written in fp32: a plain load would round it to the nearest, and lose
        most of its last updates. The learner's state, which is the same policy, is written once more, as every export
        of this process will be. The log knows the policy by its own digest; the event has the copy's.

        An iteration that was planned in fp32 may sample from a policy whose state isn't kept any more: it gets the
        weights as they are, and the event says so.
        """
        run = self._run
        was = f"policy {version.digest} was written in fp32, and {run.sampler.call('computes_in')}"
        if not self._has_state(version):
            message = f"{was} rounds it to the nearest: the learner's state behind it isn't kept"
            run.tell_once("policy_rounded", message, k, policy=version.digest)
            return weights
        self.load_learner(k)
        self._held.copy = run.dir.path / "learner" / f"for_sampler_{version.digest}.partial"
        _remove(self._held.copy)
        rounded: WeightsRef = run.learner.call("export", policy_dir=self._held.copy)
        message = f"{was} samples from a copy ({rounded.digest}) that was rounded at random from the learner's weights"
        run.tell_once("policy_rounded", message, k, policy=version.digest, copy=rounded.digest)
        return rounded

    def _has_state(self, version: PolicyVersion) -> bool:
        """Whether the learner can go back to a policy that was trained."""
        return self._state(version.iteration - 1).is_dir()

    def _state(self, k: int) -> Path:
        return state_dir(self._run.dir, k)


def _remove(copy: Path | None) -> None:
    """A copy follows from state and seed."""
    if copy is not None:
        shutil.rmtree(copy, ignore_errors=True)


def gap_of(here: StageDir) -> WeightsGap | None:
    """What was noted when the stage's completions were sampled."""
    found = here.meta("completions").get("weights_gap")
    return WeightsGap.model_validate(found) if found else None


def decoding_of(here: StageDir) -> DecodingGap | None:
    """The same, of the completions themselves."""
    found = here.meta("completions").get("decoding_gap")
    return DecodingGap.model_validate(found) if found else None

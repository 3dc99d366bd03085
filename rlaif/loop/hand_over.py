"""Which policy the sampler and the learner hold, how it gets to them, and whether both hold the same one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlaif.errors import RlaifError, UserError
from rlaif.loop.gaps import WRONG, decoding_gap, to_score_again, weights_gap
from rlaif.records import Completion, DecodingGap, PolicyVersion, TokenSequence, WeightsGap
from rlaif.rundir.checkpoints import new_optimizer, policy_dir, state_dir, superfluous
from rlaif.rundir.store import StageDir, replace_dir
from rlaif.workers.weights import WeightsRef

if TYPE_CHECKING:
    from rlaif.loop.running import Running


class _Export(NamedTuple):
    """In what precision the sampler gets a policy, and whether it has to be written in it first."""

    precision: str
    anew: bool


class HandOver:
    """Brings sampler and learner to the policy that an iteration starts from, and compares them."""

    def __init__(self, run: Running) -> None:
        self._run = run
        self.sampler_has: str | None = None
        """Digest of the policy in the sampler; None until something was loaded: it starts with the base policy."""
        self._fixed: list[TokenSequence] = []  # texts that weights are compared by; made once
        self._gap: tuple[str, WeightsGap] | None = None  # of the policy with that digest
        self._learner_at: int | None = None  # iterations that the learner has behind it; None until that is known

    def policy_before(self, k: int) -> tuple[PolicyVersion, WeightsRef]:
        """The policy that iteration k samples from, and where its weights are."""
        run = self._run
        for i in range(k - 1, -1, -1):
            if (made := run.dir.iteration(i).policy_made()) is not None:
                weights = WeightsRef(digest=made, path=run.dir.iteration(i).path / "policy")
                return PolicyVersion(iteration=i + 1, digest=made), weights
        return PolicyVersion(iteration=0, digest=run.base.digest), run.base

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

    def load_sampler(self, k: int) -> None:
        """Gives the sampler the policy that iteration k samples from, and compares it with the learner's.

        Raises:
            UserError: the policy's files are gone.
            RlaifError: the sampler doesn't hold it after all.
        """
        version, weights = self.policy_before(k)
        has = self.sampler_has or self._run.base.digest
        if has != version.digest:
            weights.folder()  # gone, they are missed before a worker misses them
            if self._export_of(version).anew:
                self._load_anew(k, version)
            else:
                self._run.sampler.call("load", weights=weights)
        self.sampler_has = version.digest
        self._compare(k, version)

    def load_learner(self, k: int) -> None:
        """Brings the learner to the state before iteration k, unless it is there already."""
        updated = [i for i in range(k) if self._run.dir.iteration(i).policy_made() is not None]
        behind = updated[-1] + 1 if updated else 0
        if self._learner_at == behind:
            return
        if behind:
            policy, state = self.policy_before(behind)[1], self._state(behind - 1)
            if (steps := new_optimizer(state)) is not None:
                self._run.learner.call("start", policy=policy, global_step=steps)
            else:
                self._run.learner.call("load", state=WeightsRef(digest=policy.digest, path=state))
        self._learner_at = behind

    def learner_moves(self) -> None:
        """An update begins: until it is committed, the learner's weights belong to no version."""
        self._learner_at = None

    def commit(self, k: int, policy: Path) -> dict[str, Any]:
        """Writes the learner's state and the policy that iteration k made, each with one rename; for the meta file."""
        run, state = self._run, self._state(k)
        partial = {folder: folder.with_name(folder.name + ".partial") for folder in (state, policy)}
        for folder in partial.values():
            shutil.rmtree(folder, ignore_errors=True)
        made: WeightsRef = run.learner.call("save", state_dir=partial[state], policy_dir=partial[policy])
        replace_dir(partial[policy], policy)
        replace_dir(partial[state], state)
        self._learner_at = k + 1
        return {"policy_digest": made.digest, "exported": run.learner.call("exports_in")}

    def prune(self, k: int) -> None:
        """After iteration k, removes the checkpoints that `keep_checkpoints` doesn't name, and tells it before: each
        policy has the size of the model, each learner's state some six times that. Reference policies stay: of this
        iteration, and of those that a branch or a rollback may go on from."""
        run = self._run
        gone = superfluous(run.dir, run.job.keep_checkpoints, k + 1)
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
                shutil.rmtree(left)
        for folder in (*(policy_dir(run.dir, i) for i in gone.policies), *(self._state(i) for i in gone.states)):
            going = folder.with_name(f"{folder.name}.partial")
            os.replace(folder, going)  # so that what has a checkpoint's name is whole
            shutil.rmtree(going)

    # ---- do both hold the same policy?

    def gap_noted(self) -> dict[str, Any]:
        """For the meta file of what was just sampled."""
        return {"weights_gap": self._gap[1].model_dump(mode="json")} if self._gap else {}

    def score_again(self, k: int, sampled: list[Completion]) -> dict[str, Any]:
        """Some of what was just sampled, scored by the learner: the sampler reads the fixed texts in one pass, and they
        say nothing about its way of decoding. For the meta file."""
        some = to_score_again(sampled, seed=self._run.job.seed * 1_000_003 + k)
        if not some:  # an engine that records no log p
            return {}
        self.load_learner(k)
        texts = [TokenSequence(prompt_token_ids=c.prompt_token_ids, token_ids=c.token_ids) for c in some]
        gap = decoding_gap(some, self._run.learner.call("logprobs", sequences=texts))
        return {"decoding_gap": gap.model_dump(mode="json")}

    def _compare(self, k: int, version: PolicyVersion) -> None:
        """After every load, and before the first sample: do sampler and learner hold the same policy?

        Raises:
            RlaifError: they plainly don't; whatever was sampled would be another model's.
        """
        if self._gap is not None and self._gap[0] == version.digest:
            return
        run = self._run
        self.load_learner(k)
        if not self._fixed:
            self._fixed = run.sampler.call("sequences_of", prompts=run.held_out)
        if not self._fixed:  # a tokenizer that knows no word of the prompts
            return
        ours = run.sampler.call("logprobs", sequences=self._fixed)
        theirs = run.learner.call("logprobs", sequences=self._fixed)
        gap = weights_gap(ours, theirs, run.sampler.call("computes_in"), self._export_of(version).precision)
        if gap.typical > WRONG:
            raise RlaifError(
                f"the sampler ({gap.sampler}) doesn't hold the policy that is trained: log-probabilities of fixed "
                f"texts differ by {gap.typical:.2f} nats a token. `rlaif doctor --deep {run.job.policy.model}` says "
                "where it happens; sampling.engine: transformers may be safe"
            )
        self._gap = (version.digest, gap)

    def _export_of(self, version: PolicyVersion) -> _Export:
        if not version.iteration:
            return _Export("as given", anew=False)
        # What it was written in then: this process may compute in something else.
        written = self._run.dir.iteration(version.iteration - 1).meta("updates").get("exported", "bf16")
        anew = written == "fp32" and self._run.learner.call("exports_in") == "bf16"
        return _Export("bf16" if anew else written, anew)

    def _load_anew(self, k: int, version: PolicyVersion) -> None:
        """Gives a bf16 sampler the newest policy, which was written in fp32: a plain load would round it to the
        nearest, and lose most of its last updates. The learner's state, which is the same policy, is written once more,
        as every export of this process will be. The log knows the policy by its own digest; the event has the copy's.
        """
        run = self._run
        self.load_learner(k)
        copy = run.dir.path / "learner" / "for_sampler.partial"
        shutil.rmtree(copy, ignore_errors=True)
        rounded: WeightsRef = run.learner.call("export", policy_dir=copy)
        message = (
            f"policy {version.digest} was written in fp32, and {run.sampler.call('computes_in')} samples from a copy "
            f"({rounded.digest}) that was rounded at random from the learner's weights"
        )
        run.tell_once("policy_rounded", message, k, policy=version.digest, copy=rounded.digest)
        run.sampler.call("load", weights=rounded)
        shutil.rmtree(copy, ignore_errors=True)  # it follows from state and seed

    def _state(self, k: int) -> Path:
        return state_dir(self._run.dir, k)


def gap_of(here: StageDir) -> WeightsGap | None:
    """What was noted when the stage's completions were sampled."""
    found = here.meta("completions").get("weights_gap")
    return WeightsGap.model_validate(found) if found else None


def decoding_of(here: StageDir) -> DecodingGap | None:
    """The same, of the completions themselves."""
    found = here.meta("completions").get("decoding_gap")
    return DecodingGap.model_validate(found) if found else None

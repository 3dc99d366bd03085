"""What each kind of judge says of itself: how a text serves it, what it is asked, what it needs, how it is opened.

In: a judge's settings. Out: its `JudgeKind`. Who has a judge to do with asks it here, and never which kind it is. No
torch. To add a kind: settings in `rlaif.config.JUDGES` and in the union `AnyJudge`, a class here, and one line in
`_KINDS`. Without a change here: docs/extend.md.
"""

from __future__ import annotations

import atexit
import hashlib
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rlaif import models
from rlaif.config import ChatSettings, Job, Judge, LikelihoodSettings, OwnJudge, Serve
from rlaif.console import counted
from rlaif.constitutions.constitution import Constitution, Principle
from rlaif.constitutions.derived import NEWEST
from rlaif.constitutions.templates import Template, shown_by, template_names
from rlaif.errors import UserError
from rlaif.hardware import gpu_names
from rlaif.judging.ballots import (
    Role,
    evaluating_voices,
    juror_names,
    likelihood_parameters,
    make_ballots,
    make_chat_ballots,
    selecting_voices,
)
from rlaif.judging.outcomes import Said, said_by_guard, said_by_scores, said_in_reply, tolerances
from rlaif.judging.parsing import Reply
from rlaif.judging.servers import server_name
from rlaif.judging.spending import Wasted, spent_on
from rlaif.judging.transport import check_address
from rlaif.records import Ballot, Pair, Prompt, VoiceKey, Vote
from rlaif.rundir.store import read_grown
from rlaif.serving.servers import KEY_VARIABLE, Servers
from rlaif.workers.placement import spread, usable_gpus

S = TypeVar("S", bound=Judge)
Place = tuple[VoiceKey, str]
"""A ballot among those about a pair: its voice, and the order in which it shows the pair."""
Factory = tuple[str, dict[str, Any]]
"""`"module:callable"` and its arguments: what a worker is built from."""

MOST_EXCUSED = 256
"""Ballots that a server may reject, for what they ask, before it has answered a first one: until then they are held
back."""
_SCORES_ARE_ROUNDED = 1.1e-4
"""Of a difference of two recorded scores, in nats: each has four decimals."""


class Casts(Protocol):
    """A judge that is open."""

    @property
    def cast(self) -> Callable[..., Iterator[list[Vote]]]:
        """Votes on ballots about pairs of candidates under a constitution, in chunks; with what `cast_with` says."""
        ...


class JudgeKind(Generic[S]):
    """One kind of judge, with the settings of one; what is said here holds unless a kind says otherwise."""

    derives = False
    """It derives contrasts that a text lacks from its rules."""
    per_principle = False
    """Each of its ballots is about one principle: votes under a text are votes under each part of it."""
    under_way = 1
    """Ballots that can be with it at once."""
    open_pairs = 1
    """Pairs that it is asked about at once, where it is `fed`: so many that it never waits for a ballot, whatever votes
    it holds back."""
    shows_slots = True
    """Its ballots show two answers, one before the other: the order could sway it."""
    early_stop = False
    """Its ballots are cast in rounds, and those that can't change a decision any more are left out."""
    fed = False
    """Its `cast` takes more ballots while others are under way (`feed`, of `MoreBallots`), since it only waits."""
    own_time = True
    """How long it takes isn't known from the size of a model here."""
    local_model: str | None = None
    """The model that is loaded on this machine for it: by its worker, or by servers that we start."""
    serve: Serve | None = None
    """How servers are started for it; None where it needs none."""
    rests = False
    """What its worker holds of a GPU it can give back for a while (`device: shared`)."""
    frozen = False
    """It answers from weights whose digest the run holds: asked again, it says the same."""
    unshown: str | None = None
    """Why its questions can't be shown from the log; None where they can."""
    note_on_reading: str | None = None
    """What can't be told when its votes are read again (`read_again`)."""

    def __init__(self, settings: S):
        self.settings = settings

    # A text, as this judge asks about it.

    def as_read(self, constitution: Constitution) -> Constitution:
        """A text as this judge asks about it; contrasts are derived by the newest wordings where it has none yet.

        Raises:
            UserError: the text doesn't serve this judge.
        """
        if self.derives:
            constitution = constitution.derived_by(constitution.wordings or NEWEST)
        for p in constitution.principles:
            if why := self.unserved(p):
                raise UserError(f"constitution {constitution.ref}, principle `{p.id}`: {why}")
        return constitution

    @staticmethod
    def unserved(principle: Principle) -> str | None:
        """Why this judge can't ask about a principle, and the next step; None where it can."""
        return None

    def selecting(self, constitution: Constitution) -> list[str]:
        """Ids of the voices that score single completions, so that pairs can be chosen by scores.

        Raises:
            UserError: there is none.
        """
        raise UserError(f"pairing.method: judge {self.settings.kind} scores no single answers; set random or all")

    def evaluates(self, constitution: Constitution) -> bool:
        """Whether held-out answers can be measured under a text."""
        return True

    def template_names(self, constitution: Constitution, role: Role, known: Container[str] = ()) -> list[str]:
        """Templates that it asks with; none for a judge that doesn't read."""
        return []

    @property
    def templates_dir(self) -> str:
        """Folder of its templates."""
        return ""

    # What it is asked.

    def ballots(
        self,
        pairs: Iterable[Pair],
        constitution: Constitution,
        role: Role = "decide",
        seed: int = 0,
        name: str = "",
        templates: Sequence[Template] = (),
    ) -> list[Ballot]:
        """What it is asked about pairs, pair by pair: the same about each, except that a voice which selected a pair
        isn't asked about it. `name` is that of a judge without a server (`name`), `templates`
        are those of the role.

        Raises:
            UserError: a template can't ask what `judge.votes_per_principle` wants.
        """
        raise NotImplementedError

    def shows(self, ballot: Ballot, constitution: Constitution, templates: Sequence[Template]) -> str:
        """What a ballot shows of its text, as a digest: with equal ones, and all else equal, two ballots about two
        texts are one question. `templates` are those in force."""
        return constitution.hash

    def places(
        self, pair: Pair, constitution: Constitution, name: str, templates: Sequence[Template], seen: Sequence[Ballot]
    ) -> dict[Place, int]:
        """Where each of its ballots about a pair stands in the order in which they are made: sums of the same votes in
        another differ in the last bit. `seen` are those that were made; the rest is as for `ballots`."""
        return {
            (b.voice_key, b.order): n
            for n, b in enumerate(self.ballots([pair], constitution, "decide", 0, name, templates))
        }

    def name(self, digest: str | None) -> str:
        """What ballots call it: its kind and who exactly answers, by `digest` where that is known."""
        return f"{self.settings.kind}:{digest or self.settings.model}"

    def cast_with(
        self, templates: Sequence[Template], journal: Path | None = None, prompts: Sequence[Prompt] = ()
    ) -> dict[str, Any]:
        """Further arguments of its `cast`. `journal` is a file for the ballots that were sent off, `prompts` are all
        that an iteration asks: no answer may depend on which of them have pairs."""
        return {}

    def prompts_at_once(self, tokens: int) -> int | None:
        """Its answers depend on what else it is asked at the same time: so many prompts' completions and pairs, in the
        plan's order, are one call. By the settings alone, so that it is asked alike while the policy samples and after.
        None: what is owed is asked together, however much it is.

        Args:
            tokens: of one prompt's pairs, should answers be half as long as they may be.
        """
        return None

    def afresh(self) -> dict[str, Any]:
        """Further arguments of its `cast` for questions that were asked before, to be asked again."""
        return {}

    def again(self, ballots: int) -> str:
        """What becomes of ballots that were sent off when judging was interrupted."""
        return "the call that was in flight is made again"

    # What it needs.

    def check(self) -> None:
        """Before anything else is done.

        Raises:
            UserError: it can't be asked, whatever is asked.
        """

    def worker(
        self, model: Path | None, votes: Iterable[Vote], wasted: Path, servers: Servers | None = None
    ) -> Factory:
        """How its worker is built. `model` is the folder of `local_model`; `votes` are those of the run's earlier
        processes, `wasted` its file of answers that held no reply; `servers` are those of `serve`."""
        raise NotImplementedError

    def listed(self, servers: Servers | None = None) -> dict[str, tuple[str, ...]]:
        """By judge, as ballots name it: the servers that share its ballots, as votes name them; empty without a server.
        `servers` are those of `serve`."""
        return {}

    def measures(self, job: Job, same_weights: bool) -> bool:
        """Whether it can say, too, how sane an answer is under the base policy; `same_weights`: its are that one's."""
        return False

    def tokens(self, scores: int, ballots: int, answer: float) -> float:
        """Tokens that this machine computes for so many scores and ballots about answers of this length."""
        return 0.0

    def open(self, note: Callable[[str], None]) -> tuple[Casts, str]:
        """Itself, in this process, and what ballots call it; `note` is told what takes time.

        Raises:
            UserError: a model or a key is missing.
        """
        raise NotImplementedError

    # What its votes say.

    def priced(self) -> dict[str, bool]:
        """Judges that are paid for, as ballots name them, and whether their tokens have a price."""
        return {}

    def money(self, votes: Iterable[Vote]) -> float:
        """What votes cost, by its prices."""
        return 0.0

    def read_again(self, vote: Vote, template: Template | None) -> Vote:
        """A recorded vote as its reply, or its scores, are read today."""
        return vote


class LikelihoodKind(JudgeKind[LikelihoodSettings]):
    """A frozen model that compares likelihoods."""

    derives = True
    rests = True
    frozen = True
    per_principle = True
    shows_slots = False
    own_time = False

    @property
    def local_model(self) -> str:  # type: ignore[override]
        return self.settings.model

    @staticmethod
    def unserved(principle: Principle) -> str | None:
        if principle.has_words or "decide" not in principle.lacks:
            return None
        return (
            f"{_wordless(principle)}, so the likelihood judge can derive no contrast from it; write what an answer "
            "should be or do, or give a contrast of your own (`prefer` and `avoid`)"
        )

    def selecting(self, constitution: Constitution) -> list[str]:
        if not (voices := selecting_voices(constitution)):
            raise UserError(
                f"constitution {constitution.ref}: no contrast has `use: select`, and pairing.method=best_worst "
                "needs one; add such a paraphrase, or set pairing.method to random or all"
            )
        return voices

    def evaluates(self, constitution: Constitution) -> bool:
        return bool(evaluating_voices(constitution))

    def ballots(
        self,
        pairs: Iterable[Pair],
        constitution: Constitution,
        role: Role = "decide",
        seed: int = 0,
        name: str = "",
        templates: Sequence[Template] = (),
    ) -> list[Ballot]:
        return make_ballots(pairs, constitution, name, role, seed, likelihood_parameters(self.settings))

    def shows(self, ballot: Ballot, constitution: Constitution, templates: Sequence[Template]) -> str:
        """Nothing beside the contrast or the measure that the ballot's template is the hash of."""
        return ""

    def cast_with(
        self, templates: Sequence[Template], journal: Path | None = None, prompts: Sequence[Prompt] = ()
    ) -> dict[str, Any]:
        return {"prompts": prompts} if prompts else {}

    def prompts_at_once(self, tokens: int) -> int:
        """As many as fill its forward passes: in other batches a likelihood has another last bit."""
        from rlaif.judging.kv_scoring import KV_BATCHES

        return max(KV_BATCHES * self.settings.batch_tokens // max(tokens, 1), 1)

    def worker(
        self, model: Path | None, votes: Iterable[Vote], wasted: Path, servers: Servers | None = None
    ) -> Factory:
        return likelihood_worker(model, self.settings)

    def measures(self, job: Job, same_weights: bool) -> bool:
        return same_weights and self.settings.chat_template_args == job.policy.chat_template_args

    def tokens(self, scores: int, ballots: int, answer: float) -> float:
        # Each side of a contrast is one pass over question and answer; a ballot looks at two answers.
        return (scores * 2 + ballots * 4) * (answer + 15)

    def open(self, note: Callable[[str], None]) -> tuple[Casts, str]:
        from rlaif.judging.cache import LikelihoodCache
        from rlaif.judging.likelihood import LikelihoodJudge

        path = models.resolve(self.settings.model, progress=lambda message, share: note(message))
        judge = LikelihoodJudge(str(path), self.settings)
        weights = models.digest_of(path)
        if self.settings.cache:
            # The configuration, too: it says how the weights are to be multiplied.
            config = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
            judge.remember(LikelihoodCache(self.settings.cache), f"{weights} {config}")
        return judge, self.name(weights)

    def read_again(self, vote: Vote, template: Template | None) -> Vote:
        """A vote made again from its scores; what their rounding can't tell stays as it was."""
        if vote.abstain_reason == "infra_error" or vote.score_first is None or vote.score_second is None:
            return vote
        difference = vote.score_first - vote.score_second
        if vote.p_first is not None:
            said = said_by_scores(difference, self.settings.score_temperature)
            rounding = _SCORES_ARE_ROUNDED / self.settings.score_temperature
            near = said.p_first is not None and abs(said.p_first - vote.p_first) <= rounding
            return vote if near else _updated(vote, said)
        tolerance = tolerances(self.settings).get(vote.ballot.voice.rpartition("/")[2])
        if tolerance is None or abs(abs(difference) - tolerance) <= _SCORES_ARE_ROUNDED:
            return vote
        return _updated(vote, said_by_guard(difference, tolerance))


class ChatKind(JudgeKind[ChatSettings]):
    """One or more models behind servers."""

    fed = True
    note_on_reading = "the log has no label probabilities: a vote that is read otherwise now keeps the p(first) it had"

    @property
    def under_way(self) -> int:  # type: ignore[override]
        return self.settings.concurrency

    @property
    def serve(self) -> Serve | None:  # type: ignore[override]
        return self.settings.serve

    @property
    def local_model(self) -> str | None:  # type: ignore[override]
        return self.serve.model if self.serve else None

    @property
    def open_pairs(self) -> int:  # type: ignore[override]
        held_back = 2 * self.settings.breaker_failures + MOST_EXCUSED
        return 4 * self.under_way + held_back * len(self.settings.jurors)

    @property
    def early_stop(self) -> bool:  # type: ignore[override]
        return self.settings.early_stop

    @property
    def templates_dir(self) -> str:
        return self.settings.templates_dir

    @staticmethod
    def unserved(principle: Principle) -> str | None:
        if principle.has_words:
            return None
        return (
            f"{_wordless(principle)}, and a judge that reads has nothing else to go by; write what an answer should be "
            "or do"
        )

    def template_names(self, constitution: Constitution, role: Role, known: Container[str] = ()) -> list[str]:
        return template_names(self.settings, constitution, role, known)

    def ballots(
        self,
        pairs: Iterable[Pair],
        constitution: Constitution,
        role: Role = "decide",
        seed: int = 0,
        name: str = "",
        templates: Sequence[Template] = (),
    ) -> list[Ballot]:
        jurors, by_principle = self.settings.jurors, self.settings.votes_per_principle
        return list(
            make_chat_ballots(pairs, constitution, jurors, templates, role, by_principle, seed, self.settings.clamp)
        )

    def shows(self, ballot: Ballot, constitution: Constitution, templates: Sequence[Template]) -> str:
        """The words that its template makes of the text. One with another template is another question anyway."""
        template = next((t for t in templates if t.hash == ballot.template), None)
        _, _, asked = ballot.voice.partition("/")
        return "" if template is None else shown_by(template, constitution, asked or None)

    def cast_with(
        self, templates: Sequence[Template], journal: Path | None = None, prompts: Sequence[Prompt] = ()
    ) -> dict[str, Any]:
        return {"templates": templates, "journal": journal}

    def afresh(self) -> dict[str, Any]:
        return {"fresh": True}

    def again(self, ballots: int) -> str:
        return f"{ballots} ballots that had been sent off have no vote, and may be asked twice"

    def check(self) -> None:
        for juror in self.settings.jurors:
            check_address(juror)

    def worker(
        self, model: Path | None, votes: Iterable[Vote], wasted: Path, servers: Servers | None = None
    ) -> Factory:
        spent = spent_on(votes, self.settings, read_grown(wasted, Wasted))
        return "rlaif.judging.chat:make", {"spent": spent, "wasted": wasted, **self._reached(servers)}

    def listed(self, servers: Servers | None = None) -> dict[str, tuple[str, ...]]:
        names, reached = juror_names(self.settings.jurors), self._reached(servers)["settings"]
        of_each = (tuple(map(server_name, juror.addresses)) for juror in reached.jurors)
        return dict(zip(names, of_each, strict=True))

    def open(self, note: Callable[[str], None]) -> tuple[Casts, str]:
        from rlaif.judging.chat import make

        servers = Servers("judge", self.serve.replicas) if self.serve else None
        judge = make(**self._reached(servers))
        if servers:
            judge.servers = servers
            atexit.register(servers.close)
            self._start(servers, note)
        return judge, self.name(None)

    def _reached(self, servers: Servers | None) -> dict[str, Any]:
        """What the judge is made from, where its servers are."""
        if servers is None:
            return {"settings": self.settings}
        return {"settings": self.settings.at(servers.urls, KEY_VARIABLE), "environment": servers.environment}

    def _start(self, servers: Servers, note: Callable[[str], None]) -> None:
        """Starts its servers for a command, and waits for them."""
        assert self.serve is not None
        model = models.resolve(self.serve.model, progress=lambda message, share: note(message))
        usable = usable_gpus(len(gpu_names()))
        gpus = spread(self.serve, usable, len(usable))
        logs = Path(tempfile.mkdtemp(prefix="rlaif-judge-"))
        note(f"starting {counted(servers.width, 'server')} of {self.serve.model}; logs in {logs}")
        try:
            servers.start(self.serve, model, self.settings.model, self.settings.precision, gpus, logs, note)
            servers.ready()
        except BaseException:
            servers.close()
            raise

    def priced(self) -> dict[str, bool]:
        jurors = self.settings.jurors
        return {n: j.model in self.settings.prices for n, j in zip(juror_names(jurors), jurors, strict=True)}

    def money(self, votes: Iterable[Vote]) -> float:
        return spent_on(votes, self.settings).money

    def read_again(self, vote: Vote, template: Template | None) -> Vote:
        """A reply parsed again."""
        if template is None or vote.abstain_reason == "infra_error":
            return vote
        reply = Reply(content=vote.raw_reply, finish_reason=vote.finish_reason, model=vote.model)
        said = said_in_reply(reply, template, vote.ballot.order, self.settings.clamp, vote.p_first)
        if said.outcome == "abstain" and vote.abstain_reason == "refused":
            # A server that says by itself that it refused leaves no word of that in the reply's text.
            said = said._replace(abstain_reason="refused")
        return _updated(vote, said._replace(mass_neither=vote.mass_neither))


_KINDS: dict[type[Judge], type[JudgeKind[Any]]] = {LikelihoodSettings: LikelihoodKind, ChatSettings: ChatKind}


def kind_of(settings: Judge) -> JudgeKind[Any]:
    """The kind of a judge, with its settings."""
    for section, kind in _KINDS.items():
        if isinstance(settings, section):
            return kind(settings)
    from rlaif.judging.own import OwnKind

    assert isinstance(settings, OwnJudge)
    return OwnKind(settings)


def likelihood_worker(model: Path | None, settings: LikelihoodSettings) -> Factory:
    """How a worker with a frozen model is built, who judges or measures; `model` is its folder."""
    return "rlaif.judging.likelihood:make", {"model_path": str(model), "settings": settings}


def _wordless(principle: Principle) -> str:
    return f"its rule is {principle.rule!r}, without a word"


def _updated(vote: Vote, said: Said) -> Vote:
    """The vote itself unless something is different."""
    different = {name: value for name, value in said._asdict().items() if getattr(vote, name) != value}
    return vote.model_copy(update=different) if different else vote

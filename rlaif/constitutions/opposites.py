"""A rule turned around: "Prefer the answer that is short" becomes "Prefer the answer that is long". English. Pure.

In: a rule. Out: the rule that asks for the contrary, said in words that ask for something. A small model hardly reads
"not": two instructions that differ by a "not" are nearly the same to it, two that ask for different things aren't
(docs/judges.md has the numbers). So a word with a known opposite is replaced by it, and "no", "never" and "without"
are taken away; a part that holds neither is negated, which is the weakest way, and `turned` says so.

A part of a rule that refuses something ("avoids long words", "never blames") is turned by its refusal alone: with both
changed it would ask for the same again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from rlaif.constitutions.verbs import begins_with_verb

_QUALITIES = """
    short ↔ long; shorter ↔ longer; brief ↔ long; brevity ↔ length; concise ↔ wordy; terse → wordy; lengthy → short
    verbose → concise; rambling → concise; detailed → vague; in detail → in passing; thorough → superficial
    complete ↔ incomplete; comprehensive → sketchy; deep ↔ shallow; key point → smallest detail
    main point → smallest detail; one or two sentences → many long sentences
    two or three sentences → many long sentences; one sentence → many long sentences
    a single sentence → many long sentences; two sentences → many long sentences
    a few sentences → many long sentences; one paragraph → many paragraphs; one line → many lines
    one word → many words; few ↔ many; fewer ↔ more; less ↔ more; at most → more than; at least → less than
    no more than → more than; more than → less than; up to → more than; stops → goes on and on
    then stop → then go on and on; list → paragraph; a numbered list → one paragraph
    a bulleted list → one paragraph; lists → paragraphs; bullet points → long paragraphs; bullets → long paragraphs
    a table → one paragraph; headings → one block of text; paragraph → list; prose → lists
    step by step → all at once; in order → in disorder; structured → unstructured; organised → messy
    organized → messy; tidy ↔ messy; simple ↔ complicated; simply → in a complicated way; plain → technical
    technical → everyday; common ↔ rare; everyday ↔ technical; familiar ↔ unfamiliar; ordinary ↔ unusual
    easy ↔ difficult; basic ↔ advanced; academic → everyday; concrete ↔ abstract; specific ↔ vague; precise ↔ vague
    exact → rough; exactly → roughly; clear ↔ confusing; clearly → in a confusing way; readable → unreadable
    direct ↔ evasive; directly → evasively; a child → a professor; children → professors; beginners ↔ experts
    a beginner ↔ an expert; polite ↔ rude; politely ↔ rudely; courteous → rude; kind ↔ cruel; friendly ↔ hostile
    warm ↔ cold; warmly → coldly; gentle ↔ harsh; gently ↔ harshly; patient ↔ impatient; respectful → disrespectful
    respectfully → disrespectfully; calm ↔ angry; calmly → angrily; tactful → blunt; empathetic → indifferent
    empathy → indifference; caring → indifferent; modest ↔ boastful; humble ↔ arrogant; encouraging ↔ discouraging
    encourages ↔ discourages; cheerful ↔ gloomy; positive ↔ negative; optimistic ↔ pessimistic
    supportive → dismissive; welcoming → cold; formal ↔ casual; formally ↔ casually; informal → formal
    informally → formally; serious ↔ silly; funny → dull; professional → unprofessional; humorous → dull
    playful → stern; lively ↔ dull; interesting ↔ boring; engaging → boring; creative ↔ unimaginative; vivid ↔ dull
    poetic → matter-of-fact; objective ↔ biased; neutral → biased; balanced ↔ one-sided; impartial → biased
    fair ↔ unfair; both sides → one side only; honest ↔ dishonest; honestly → dishonestly; truthful → untrue
    true ↔ false; truth ↔ lies; correct ↔ wrong; correctly ↔ wrongly; accurate ↔ inaccurate
    accurately → inaccurately; right ↔ wrong; factual → made up; facts → rumours; careful ↔ careless
    carefully → carelessly; cautious ↔ reckless; cautiously → recklessly; responsible → irresponsible
    safe ↔ dangerous; safely → dangerously; harmless ↔ harmful; legal ↔ illegal; ethical → unethical
    private ↔ public; certain ↔ uncertain; sure ↔ unsure; confident ↔ hesitant; confidently → hesitantly
    helpful ↔ useless; useful ↔ useless; relevant ↔ irrelevant; on topic → off topic; important ↔ trivial
    repetitive → varied; fluent → broken; consistent → contradictory; logical → illogical; reasonable → absurd
    sensible → absurd; original → copied; good ↔ bad; better ↔ worse; best ↔ worst; first ↔ last; early ↔ late
    before ↔ after; beginning ↔ end; begins ↔ ends; begin ↔ end; starts ↔ ends; start ↔ end; always ↔ never
    often ↔ rarely; usually → rarely; every ↔ no; each → no; everything ↔ nothing; everybody ↔ nobody
    everyone ↔ no one; high ↔ low; large ↔ small; big ↔ small; new ↔ old; modern ↔ old-fashioned; fast ↔ slow
    quickly ↔ slowly; strong ↔ weak; active ↔ passive; British ↔ American; singular ↔ plural; same ↔ different
"""
"""`a ↔ b` both ways, `a → b` one way. Longer phrases are found first."""

_VERBS = """
    refuse → give; decline → give; avoid → use; omit → include; exclude → include; include → omit; skip → include
    leave out → put in; hide → show; lack → have; ignore ↔ consider; mention ↔ conceal; admit ↔ deny
    help with → refuse; help → hinder; assist → hinder; accept ↔ reject; agree with ↔ contradict; agree ↔ disagree
    oppose ↔ support; thank → ignore; apologise → make excuses; apologize → make excuses; blame ↔ excuse
    praise ↔ criticise; criticize → praise; flatter → criticise; insult → compliment; comfort ↔ upset
    reassure ↔ worry; protect ↔ endanger; obey ↔ disobey; follow ↔ break; stick to ↔ stray from
    stay on ↔ stray from; evade → answer; simplify ↔ complicate; clarify ↔ confuse; shorten ↔ lengthen
    summarise → drag out; summarize → drag out; warn of → keep silent about; warn about → keep silent about
    promise → rule out; recommend ↔ advise against; remember ↔ forget; tell the truth ↔ tell lies; lie → tell the truth
    hedge → assert; respect ↔ insult; explain → be short; list the → leave out the; list all → leave out all
    list its → leave out its; list every → leave out every
"""
"""Base forms; "refuses" and "refuse" are found alike, and answered in kind."""

_REFUSING = ("refuse", "decline", "avoid", "omit", "exclude", "skip", "lack", "hide", "leave out", "ignore")
"""Verbs that turn their whole part: what they refuse stays."""

_IRREGULAR = {"be": "is", "have": "has", "do": "does", "go": "goes"}


def third_person(base: str) -> str:
    """ "use" → "uses", "leave out" → "leaves out"."""
    verb, space, rest = base.partition(" ")
    if verb in _IRREGULAR:
        formed = _IRREGULAR[verb]
    elif re.search(r"(?:s|x|z|ch|sh|o)$", verb):
        formed = f"{verb}es"
    elif re.search(r"[^aeiou]y$", verb):
        formed = f"{verb[:-1]}ies"
    else:
        formed = f"{verb}s"
    return formed + space + rest


_NEGATIONS: tuple[tuple[str, str], ...] = (
    (r"\b(?:does not|doesn't) (?P<verb>[a-z]+)", ""),  # its verb is inflected: "does not blame" → "blames"
    (r"\b(?:do not|don't|never) (?=[a-z])", "always "),
    (r"\b(?P<before>is|are|be|must|should|may|can|has|have) (?:not|never)\b", r"\g<before>"),
    (r"\b(?:cannot|can't)\b", "can"),
    (r"\bwithout (?:any |a |an )?", "with many "),
    (r"\bno (?=[a-z]+s\b)", "many "),
    (r"\bno (?=[a-z])", "some "),
    (r"\bnot ", ""),
)
_CONDITION = r"(?:where|when|whenever|if|unless|because|since|while|so that|except|even)"
_BETWEEN = re.compile(rf"([.,;:!?]+ ?(?:(?:and|or|nor|but|then) )?| (?:and|or|nor|but|then) | (?={_CONDITION} ))")
PREFER_THE = r"(?:please )?(?:always )?(?:prefer|choose|favou?r|pick|select) (?:the|an|a) "
_ANSWER = r"(?:answers?|repl(?:y|ies)|responses?) "
_HEAD = re.compile(
    rf"(?:{PREFER_THE}{_ANSWER}(?:that |which )?|"
    rf"(?:(?:the|an|every) )?{_ANSWER}(?:(?:should|must|has to|have to|needs? to) (?!not|never))?)",
    re.IGNORECASE,
)
"""What a rule begins with and keeps: "Prefer the answer that", "The answer should"."""
_TAKES_NO = re.compile(
    r"((?:give|use|have|contain|include|make|offer|show|add|provide|name|cite|quote|ask|put|state)s?|has) "
    r"(?:(?:a|an|the|any|some) )?",
    re.IGNORECASE,
)
_HAS_LAYOUT = re.compile(
    rf"{_TAKES_NO.pattern}(?:\w+ )?(?:lists?|tables?|headings?|bullet.points|bullets|paragraphs?)\b", re.IGNORECASE
)
"""To use a list is one thing among others, and its opposite is to use none; to be one is the whole answer's layout."""


class Turned(NamedTuple):
    """A rule turned around."""

    rule: str
    known: bool
    """It asks for something else, in words of its own; where not, it differs by a "not" or an "always" alone."""


def _table() -> dict[str, str]:
    pairs: dict[str, str] = {}
    for listed, forms in ((_QUALITIES, (str,)), (_VERBS, (str, third_person))):
        for entry in re.split(r";|\n", listed):
            if not entry.strip():
                continue
            a, arrow, b = (part.strip() for part in re.split(r"([↔→])", entry))
            for form in forms:
                pairs.setdefault(form(a).lower(), form(b))
                if arrow == "↔":
                    pairs.setdefault(form(b).lower(), form(a))
    return pairs


_OPPOSITES = _table()
_NEGATED = ("always", "never", "every", "no", "each")
"""Known, but a negation all the same."""


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """The longest first, as whole words."""
    patterns = (re.escape(w).replace(r"\ ", r"\s") for w in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![\w'-])(?:{'|'.join(patterns)})(?![\w'-])", re.IGNORECASE)


_KNOWN = _any_of(_OPPOSITES)
_REFUSALS = _any_of(form for verb in _REFUSING for form in (verb, third_person(verb)))
_HOLD = "\u00a0"
"""A blank in a known phrase, where no part ends: "one or two sentences" is one thing."""


def turned(rule: str) -> Turned:
    """The contrary of a rule, part by part: commas, "and" and "or" end a part."""
    sentence = " ".join(rule.split())
    head = match[0] if (match := _HEAD.match(sentence)) else ""
    text = _KNOWN.sub(lambda m: m[0].replace(" ", _HOLD), sentence[len(head) :])
    out, known, before = [], False, ""
    for n, part in enumerate(_BETWEEN.split(text)):
        if n % 2 or not part.strip() or re.match(rf"{_CONDITION} ", part, re.IGNORECASE):
            # What was refused as "neither … nor" is asked for with "and".
            out.append(part.replace("nor ", "and ") if n % 2 else part)
        elif before == "refused" and not begins_with_verb(part):
            out.append(part)  # "avoids jargon and long words" refuses both
        elif (refused := _refused(part)) is not None:
            new, by_word = refused
            known, before = known or by_word, "refused"
            out.append(new)
        elif _HAS_LAYOUT.match(part):
            (new, before), known = _negated(part, before), True
            out.append(new)
        elif (replaced := _replaced(part)) is not None:
            new, by_word = replaced
            known, before = known or by_word, ""
            out.append(new)
        else:
            new, before = _negated(part, before)
            out.append(new)
    return Turned(head + "".join(out).replace(_HOLD, " "), known)


def _refused(part: str) -> tuple[str, bool] | None:
    """The part without its refusal, and whether a verb said it: "never blames" → "always blames", "avoids" → "uses"."""
    for pattern, instead in _NEGATIONS:
        if match := re.search(pattern, part, re.IGNORECASE):
            new = match.expand(instead) if instead else third_person(match["verb"])
            return part[: match.start()] + _like(match[0], new) + part[match.end() :], False
    if match := _REFUSALS.search(part):
        return part[: match.start()] + _like(match[0], _opposite(match[0])) + part[match.end() :], True
    return None


def _replaced(part: str) -> tuple[str, bool] | None:
    """The part with each known word replaced, and whether one of them is more than an "always"."""
    found = [match[0] for match in _KNOWN.finditer(part)]
    if not found:
        return None
    new = _KNOWN.sub(lambda match: _like(match[0], _opposite(match[0])), part)
    return new, any(word.lower() not in _NEGATED for word in found)


def _opposite(word: str) -> str:
    return _OPPOSITES[word.lower().replace(_HOLD, " ")]


def _negated(part: str, before: str) -> tuple[str, str]:
    """The part with a "no" or a "never", and which; a noun that goes on after a "no" gets one, too."""
    if part.lower().startswith("with "):
        return f"{_like(part, 'without')}{part[4:]}", ""
    if verb := _TAKES_NO.match(part):
        return f"{verb[1]} no {part[verb.end() :]}", "no"
    if verb := re.match(r"(?:is|are|be)\b", part, re.IGNORECASE):
        return f"{verb[0]} not{part[verb.end() :]}", ""
    if before and not begins_with_verb(part):
        return (f"no {part}" if before == "no" else part), before
    return _like(part, "never ") + part[:1].lower() + part[1:], "never"


def _like(old: str, new: str) -> str:
    """With a capital where there was one."""
    return new[:1].upper() + new[1:] if old[:1].isupper() else new

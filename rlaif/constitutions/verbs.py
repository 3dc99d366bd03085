"""Could this English sentence have a verb? A modest guess by word lists and place, for a warning and nothing else.

In: a rule. Out: whether some word of it is, or by its place could be, a verb. It knows the verbs that rules are made of
and the shape of an order ("Quote every source"). What it doesn't know it takes for no verb, so it can be wrong; of
other languages it says yes, since it knows nothing of them. Pure.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*|[.,;:!?()\"“”–—-]|\d+")


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_AUXILIARIES = _words("""
    am are be been being is was were do does did don't doesn't didn't isn't aren't wasn't weren't has have had
    hasn't haven't hadn't can can't cannot could couldn't may might must mustn't shall should shouldn't will
    won't would wouldn't ought needn't let let's it's that's there's he's she's who's they're you're we're
""")
_VERBS = _words("""
    accept accuse add ask address admit advise affirm agree allow apologise apologize appear argue assume avoid
    become begin behave belittle bring calculate choose clarify come compare complain confirm consider contain
    contradict convince correct create criticise criticize decide decline define deny depend describe disagree
    disclose discuss do emphasise emphasize empathise empathize encourage ensure exaggerate exceed expect
    explain express favour favor find finish follow forget forgive get give go greet guess happen have hear
    hesitate hurt identify ignore imply include indicate inform insert insist insult interrupt introduce invent
    invite involve join judge justify keep know learn leave lecture let lie listen lose maintain make mean
    mention moralise moralize need obey offend offer omit perform personalise personalize persuade point praise
    prefer preserve pretend prevent prioritise prioritize produce promise propose protect prove provide put
    react read recommend refer reflect refuse reject remain remember remind remove repeat replace represent
    require respect respond reveal reword rely say see seek seem select send separate serve sell show solve
    speak specify speculate spell stay stop suggest summarise summarize suppose swear take talk teach tell thank
    think threaten translate treat try understand urge verify wait want warn welcome write
""")
"""Verbs that are rarely anything else; the few that are ("offer", "promise") count by their place below."""
_ALSO_NOUNS = _words("""
    address answer appeal approach attack aim base bias blame call cause challenge change charge check cite
    claim close comment compliment concern contact cost cover credit date delay detail display doubt draw end
    excuse face fact favour favor fill fit flatter flag focus form format frame fix guard guess guide handle
    harm help hint hold hope hurt insult interest joke judge label lack lead lecture level lie like limit link
    list look mark match mind mix move name need note offer open order outline own pay place plan play point
    praise present press price promise push question quote rate reach reason regard repeat reply report request
    respect rest return risk round sense set shame share show sign sort sound source stand start state step
    stick stop stress structure style support surprise switch talk target touch track trust try turn use value
    view vote walk warn wish word work
""")
"""Words that are verbs in some places only."""
_IRREGULAR = {
    "became": "become", "began": "begin", "brought": "bring", "chose": "choose", "chosen": "choose", "came": "come",
    "found": "find", "forgot": "forget", "gave": "give", "given": "give", "got": "get", "gone": "go", "went": "go",
    "heard": "hear", "kept": "keep", "knew": "know", "known": "know", "made": "make", "meant": "mean", "said": "say",
    "saw": "see", "seen": "see", "sought": "seek", "spoke": "speak", "spoken": "speak", "took": "take", "taken": "take",
    "told": "tell", "thought": "think", "understood": "understand", "wrote": "write", "written": "write",
}  # fmt: skip
_DETERMINERS = _words("""
    the a an this that these those its their his her your our my any all every each no some one two both either
    neither it them him us you me itself themselves yourself what how why whether where when who which
""")
_BEFORE_VERB = _words("""
    to that which who never always not don't doesn't please only it he she they you we i also just
    rather instead ever still then answer answers reply response assistant model bot
""")
_NO_ORDER = _words("""
    with without about in on at by for from of as into over under between through during before after against
    only just not no never always all any every each some both either neither more most less least few fewer
    many much and or but if when while where because than so too very quite rather nothing nobody none
    everything something anything the a an this that these those
""")
_SMALL_ENGLISH = _words("""
    the and of with that is are not for about or without to it never no than by
""")
_SMALL_OTHER = _words("""
    der die das und nicht ist sei ein eine kein keine mit den dem zu auf im el la los las que y en con una uno
    un del les des et est ne pas une dans il che non di e per het een niet van zijn met na os nao em och att
    inte det som nie je se jest i
""")


def could_have_verb(rule: str) -> bool:
    """Whether some word of a sentence could be its verb; yes for what doesn't look like English."""
    tokens = [t.lower().replace("’", "'") for t in _TOKEN.findall(rule)]
    words = [t for t in tokens if t[0].isalpha()]
    if not all(w.isascii() for w in words):
        return True
    if sum(w in _SMALL_OTHER for w in words) > sum(w in _SMALL_ENGLISH for w in words):
        return True
    return any(_could_be(tokens, i) for i, token in enumerate(tokens) if token[0].isalpha())


def begins_with_verb(part: str) -> bool:
    """Whether a part of a sentence begins with a verb, after adverbs; what could be a noun ("names") is one."""
    words = [t.lower() for t in _TOKEN.findall(part) if t[0].isalpha()]
    while len(words) > 1 and (words[0] in ("never", "always", "only", "also", "not") or words[0].endswith("ly")):
        words = words[1:]
    lemmas = _lemmas(words[0]) if words else set()
    if not words or words[0] in _AUXILIARIES or lemmas & _VERBS - _ALSO_NOUNS:
        return bool(words)
    return bool(lemmas & _ALSO_NOUNS) and words[1:2] != [] and words[1] in _DETERMINERS | {"with", "to"}


def _could_be(tokens: list[str], i: int) -> bool:
    word = tokens[i]
    before = tokens[i - 1] if i else ""
    after = tokens[i + 1] if i + 1 < len(tokens) else ""
    if word in _AUXILIARIES:
        return True
    lemmas = _lemmas(word)
    if lemmas & _VERBS and not lemmas & _ALSO_NOUNS:
        # "Written answers", "a repeated word": a participle before a noun is none.
        participle = word.endswith(("ed", "ing")) or (word in _IRREGULAR and word.endswith("n"))
        return not participle or after in _DETERMINERS or before in _BEFORE_VERB
    if lemmas & (_ALSO_NOUNS | _VERBS):
        if after in _DETERMINERS or before in _BEFORE_VERB:
            return True
        order = not before or not before[0].isalnum() or before.endswith("ly")
        return order and word in _ALSO_NOUNS | _VERBS and after[:1].isalnum() and after not in ("for", "of")
    # An order that begins with a word we don't know: "Rephrase the question".
    first = not before or before in (".", ";", ":", "please", "never", "always", "don't")
    return first and word not in _NO_ORDER and after in _DETERMINERS


def _lemmas(word: str) -> set[str]:
    """What the word could be a form of, itself included."""
    found = {word, _IRREGULAR.get(word, word)}
    for ending, others in (
        ("ies", ("y",)), ("es", ("", "e")), ("s", ("",)), ("ied", ("y",)), ("ed", ("", "e")), ("ing", ("", "e")),
    ):  # fmt: skip
        if word.endswith(ending) and len(word) > len(ending) + 1:
            stem = word.removesuffix(ending)
            found |= {stem + other for other in others}
            if ending in ("ed", "ing") and len(stem) > 2 and stem[-1] == stem[-2]:
                found.add(stem[:-1])
    return found

"""Judging: ballots in, votes out, and what the votes of a pair amount to.

In: pairs, a constitution, a judge's settings. Out: votes, verdicts, decisions. `ballots` (who is asked what), `chat`
and `likelihood` (the judges), `outcomes` (what a reply says of a pair), `verdicts` (votes added up), `filters` (which
labels are trusted), `calibration`. Only `kv_scoring`, which computes for `likelihood`, needs torch, when it is used. To
add a filter rule: a function in `filters`; a judge: a class with `Judge`'s methods.
"""

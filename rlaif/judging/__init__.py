"""Judging: ballots in, votes out, and what the votes of a pair amount to.

In: pairs, a constitution, a judge's settings. Out: votes, verdicts, decisions. `kinds` (what each kind of judge says of
itself; nobody else asks which kind one is), `ballots` (who is asked what), `chat`, `likelihood` and `own` (the judges),
`outcomes` (what a reply says of a pair), `verdicts` (votes added up), `filters` (which labels are trusted),
`calibration`. Only `kv_scoring`, which computes for `likelihood`, needs torch, when it is used. To add a filter rule: a
function in `filters`; a judge: settings in `rlaif.config.JUDGES` and a class in `kinds`. Without a change here:
docs/extend.md.
"""

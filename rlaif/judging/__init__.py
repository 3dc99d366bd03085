"""Judging: ballots in, votes out, and what the votes of a pair amount to.

`ballots` (who is asked what), `likelihood` (the embedded judge), `verdicts` (votes added up), `filters` (which
labels are trusted), `bench` (the judge against labelled pairs). Only `likelihood` needs torch, when it is used.
"""

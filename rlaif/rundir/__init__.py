"""The run directory, which is the log: durable rows, the list of stages, heads, the lock.

In: records. Out: files below `runs/<name>/`, written whole or row by row so that a kill loses nothing; and the records
again. `store` (files and the lock), `stages` (which stages there are), `heads` (the chain that `rlaif audit verify`
follows), `checkpoints` (what a run can go on from). To add a stage: a line in `stages`, a function in `rlaif/loop/`.
"""

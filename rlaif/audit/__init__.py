"""Questions to a run's log, answered from the run directory alone, without torch.

In: a run directory. Out: rows, explanations and findings: which votes decided a pair, what trained which checkpoint,
what a filter or a text would have decided instead, and whether the files are those that were written. `index` answers
SQL about a run (`tables` are its tables); `rows` reads a file row by row. To add a question: a module here, and a
command in `rlaif/cli/`.
"""

"""How far a judge can be trusted: what labelled data say about it.

In: a judge, labelled pairs (`rlaif.data`), people's labels from a run. Out: measures with their intervals, slice by
slice. `bench` (right, kept, right when kept), `attacks` (pairs made to fool it), `agreement` (judge against people),
`report` (tables and pictures). To add a measure: a function of judged pairs in `bench`, a column in `report`.
"""

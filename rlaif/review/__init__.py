"""What people are asked, and what they said.

In: a run's decisions. Out: the queue of pairs whose label would tell most (`queue`), and the log of labels (`labels`),
which the next iteration trains on. To ask in another order: `queue`.
"""

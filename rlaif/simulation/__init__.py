"""What a run would take on machines that aren't here: simulated, before anything is rented.

In: a job's counts (`work`), how many of each role there are and how fast one is (`cluster`: a file, or `measured` from
a run's log). Out: an `Outlook`: seconds an iteration, how busy each role is, what holds the run up, what it costs, what
one more replica would bring. `simulate` is the model: an event for every answer and every ballot (SimPy); it knows no
file, no clock, no job. To model something else that takes time: a station in `simulate`, its rate in `cluster`, a row
of use in `Simulated`. docs/scale-plan.md says how far to trust it.
"""

from rlaif.simulation.cluster import Setup, read_cluster
from rlaif.simulation.outlook import Outlook, outlook
from rlaif.simulation.work import Work, work_of

__all__ = ["Outlook", "Setup", "Work", "outlook", "read_cluster", "work_of"]

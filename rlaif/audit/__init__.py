"""Questions to a run's log: an index over its files, and every answer that `rlaif audit` and `rlaif view` show."""

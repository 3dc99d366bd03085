"""What comes from outside as rows: prompts, tables, labelled pairs, other people's recorded votes. No torch.

In: paths and names of data sets. Out: records (`Prompt`, `Labelled`, recorded votes), or a `UserError` that names the
file, the line and the next step. `tables` is the one reader of JSONL, JSON, CSV and Parquet. To read a new format: a
reader in `tables`; a new kind of data: a module here that makes records from its rows.
"""

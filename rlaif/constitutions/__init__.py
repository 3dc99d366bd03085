"""The written rules: a parsed text, what is derived from it, and the templates by which a judge reads it.

In: YAML files. Out: `Constitution` and its principles, contrasts and checks; Jinja templates. `constitution` (the
parsed text), `derived` (contrasts from a rule), `opposites` (a rule turned around), `checks` (mechanical conditions),
`templates`, `verbs` (is there one?), `copies` (what a run keeps of all these). Pure, but for reading files.
To add a field of a principle: `constitution.Principle`, and the judge that reads it.
"""

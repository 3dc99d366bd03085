"""The written rules: a parsed text, what is derived from it, and the templates by which a judge reads it. Pure.

In: YAML files. Out: `Constitution` and its principles, contrasts and checks; Jinja templates. `constitution` (the
parsed text), `derived` (contrasts from a rule), `checks` (mechanical conditions), `templates`, `verbs` (warnings).
To add a field of a principle: `constitution.Principle`, and the judge that reads it.
"""

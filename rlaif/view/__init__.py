"""A run in a browser and in one file: the pages, their pictures, the report.

In: a run directory, or a folder of them, through `rlaif.audit`. Out: HTML from a server on loopback, or one HTML file.
To add a page: a route in `pages` (of a run) or `folder` (of several), a template beside it; a picture: a function in
`pictures`.
"""

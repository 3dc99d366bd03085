"""Where a role runs: sampler, judge and learner behind one narrow interface.

In: `"module:callable"` and its arguments. Out: an object whose methods are called by name with records and paths, in
this process (`inline`) or in one of its own (`process`); a crash is one line in the loop. `placement` says which GPUs a
role sees. To run roles elsewhere: another class with `WorkerLike`'s methods, and a name for it in `start_worker`.
"""

"""Where a role runs, and how weights reach it: sampler, judge and learner behind one narrow interface.

In: `"module:callable"` and its arguments. Out: an object (`worker.Worker`) whose methods are called by name with
records and references, in this process (`inline`) or in one of its own (`process`, whose other side is `child`); a
crash is one line in the loop. `replicas` makes several of them one that share work, `ranks` several that compute
together; `ray` starts either on a cluster. `placement` says how each role runs and which GPUs it sees, `start` starts
it, `weights` is what roles hand each other instead of a policy's weights, `feed` what a call is given while it is
under way. `turns` lets roles that share a device use it one at a time. To run roles elsewhere: another class with
`Worker`'s methods, and a name for it in `start_worker`.
"""

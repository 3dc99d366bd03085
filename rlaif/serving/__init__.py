"""Servers that we start: a model behind vLLM's OpenAI-compatible server, once or several times.

In: which model, how often, on which GPUs (`rlaif.config.Serve`). Out: addresses and a key (`servers.Servers`), while
the process that asked lives. `vllm` is the program and what it is told; `keeper` is a process that starts one server,
waits for it, starts it again when it ends, and takes it along when whoever asked is gone. To serve with another
program: a module like `vllm`.
"""

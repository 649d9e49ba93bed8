"""Throughput beside other servers of the same checkpoint: fal's documented example, BentoML and
LitServe.

`throughput` is the command, `servers` starts and loads the servers, `environments` installs the
peers' packages. Each `*_server` is one peer, as its own documentation shows it.
"""

"""The pool allocator: who gets which part of which GPU.

`core` decides everything and does no I/O (`shapes`: what a request means on a device; `placement`: where it goes; `queue`: who is next;
`quotas`, `estimate`, `books`). `service` gives it a clock and a `ledger` (the node agent, which holds the truth), `api` and `events`
serve it by HTTP (docs/interfaces.md), `main` starts it (`python -m nbgpu_pool`), `config` documents the configuration file.
"""

"""The pool allocator: who gets which part of which GPU."""

"""The view with a mirror (`--cache`): all keys in memory, kept coherent by a watch.

Knows: listing, watching, resuming, applying. Does not know: system calls, gRPC, pyfuse3.
"""

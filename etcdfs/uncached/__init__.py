"""The view without a mirror (`--no-cache`): each question goes to etcd.

Knows: what to ask for a path or a directory. Does not know: system calls, watches, pyfuse3.
"""

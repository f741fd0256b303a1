"""Open files, and how what is written to them becomes puts in etcd.

Knows: handles, write buffers, write-back. Does not know: names' rules, pyfuse3.
"""

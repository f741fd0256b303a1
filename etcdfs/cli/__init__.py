"""The command line.

Knows: flags, their texts, exit codes. Does not know: etcd, FUSE; it must start fast.
"""

"""Processes, mountpoints and logs.

Knows: fork and exec, /proc, fusermount3, where a log goes. Does not know: etcd, what is mounted.
"""

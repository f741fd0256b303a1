"""Inodes and dentries, and one step of theirs from state to state.

Knows: nodes, names, versions, what a batch of events makes of them, what the kernel may have
cached. Does not know: who asks, where events come from, how the kernel is told. No I/O.
"""

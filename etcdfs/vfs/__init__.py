"""What each system call means.

Knows: POSIX, as far as keys and prefixes can have it. Does not know: pyfuse3's types, how the tree
is kept true.
"""

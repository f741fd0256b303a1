"""What runs behind a mount: its parts (`etcdfs.components`) and their doors.

Knows: every part, and the order in which they start and end. Does not know: how any of them works.
"""

"""The composition root: what runs behind a mount.

Knows: every part, and the order in which they start and end. Does not know: how any of them works.
"""

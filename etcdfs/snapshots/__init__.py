"""The snapshot of a mirror on disk (`--state-dir`): written while the mount lives, loaded at its start.

Knows: files, SQL, and when what is on disk is believed, loaded, written and forgotten. Does not
know: what a snapshot holds (`consistency.snapshot`), how a mirror shows it, when a mount is ready.
"""

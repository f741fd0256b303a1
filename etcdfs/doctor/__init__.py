"""`etcdfs doctor`: a checklist of what a mount needs, from the kernel to the keys.

Knows: what can be wrong around a mount, and how that is seen without one. Does not know: how a
mount works; a mount need not be there, and is not touched.
"""

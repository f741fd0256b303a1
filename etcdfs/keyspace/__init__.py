"""etcd's own terms, and how its keys are paths.

Knows: the port to etcd (`store`), transactions and what their answers say, records of attributes.
Does not know: inodes, the kernel, gRPC.
"""

"""The door to etcd: the port `Store` over gRPC.

Knows: members, channels, deadlines, tokens, protobuf. Does not know: paths, inodes.
"""

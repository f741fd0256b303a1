"""Mount an etcd v3 keyspace as a directory tree."""

__version__ = "0.1.0"

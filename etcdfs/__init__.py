"""Mount an etcd v3 keyspace as a directory tree."""

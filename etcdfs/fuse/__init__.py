"""The kernel's door: requests in, notifications out.

Knows: pyfuse3, and what the kernel makes of answers. Does not know: etcd, keys.
"""

import etcdfs.fuse.fastpath  # noqa: F401 -- before any module here loads pyfuse3: see there

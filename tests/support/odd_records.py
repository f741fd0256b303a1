"""Odd records of attributes, and what a file with each is to look like.

Knows: the corpus of the fuzzer, which grows with whatever it finds. The owner of the mount is 7,
his group 8, and files are 0644; what else is shown is the record's.
"""

import stat
from dataclasses import dataclass
from typing import Final

_DEEP: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    """A record, and what is to be shown for it; access is never wider than it says."""

    name: str
    value: bytes
    mode: int = stat.S_IFREG | 0o600
    uid: int = 7
    gid: int = 8
    xattrs: tuple[bytes, ...] = ()


_OPEN: Final = stat.S_IFREG | 0o644

NO_RECORD: Final = (
    Odd(name="empty", value=b""),
    Odd(name="no text", value=b"\xff"),
    Odd(name="another encoding", value='{"mode":"0666"}'.encode("utf-16")),
    Odd(name="byte order mark", value=b'\xef\xbb\xbf{"mode":"0666"}'),
    Odd(name="a list", value=b'[{"mode":"0666"}]'),
    Odd(name="a number", value=b"1"),
    Odd(name="a text", value=b'"0666"'),
    Odd(name="null", value=b"null"),
    Odd(name="cut off", value=b'{"mode":"0666"'),
    Odd(name="two", value=b'{"mode":"0666"}{"mode":"0666"}'),
    Odd(name="a comment", value=b'{"mode":"0666"} // open'),
    Odd(name="single quotes", value=b"{'mode':'0666'}"),
    Odd(name="deep list", value=b"[" * _DEEP),
    Odd(name="deep objects", value=b'{"z":' * _DEEP),
    Odd(name="deep field", value=b'{"mode":"0666","z":' + b"[" * _DEEP + b"]" * _DEEP + b"}"),
    Odd(name="a long number", value=b'{"mode":"0666","z":' + b"9" * 5000 + b"}"),
    Odd(name="a newline in a text", value=b'{"mode":"0666","z":"\n"}'),
)

ACCESS: Final = (
    Odd(name="mode as a number", value=b'{"mode": 438}'),
    Odd(name="mode of Python", value=b'{"mode": "0o666"}'),
    Odd(name="mode in decimal", value=b'{"mode": "99"}'),
    Odd(name="mode too large", value=b'{"mode": "10000"}'),
    Odd(name="mode of five digits", value=b'{"mode": "00666"}'),
    Odd(name="mode empty", value=b'{"mode": ""}'),
    Odd(name="mode with a sign", value=b'{"mode": "+666"}'),
    Odd(name="mode with spaces", value=b'{"mode": " 666"}'),
    Odd(name="mode in other digits", value='{"mode": "\u0666\u0666\u0666"}'.encode()),
    Odd(name="mode as text of a listing", value=b'{"mode": "rw-rw-rw-"}'),
    Odd(name="mode with a line end", value=b'{"mode": "0666\\n"}'),
    Odd(name="mode as a list", value=b'{"mode": ["0666"]}'),
    Odd(name="mode null", value=b'{"mode": null}'),
    Odd(name="mode twice", value=b'{"mode":"0600","mode":"0644"}', mode=_OPEN),
    Odd(name="negative uid", value=b'{"mode":"4666","uid": -1}'),
    Odd(name="uid of nobody at all", value=b'{"mode":"0666","uid": 4294967295}'),
    Odd(name="uid as text", value=b'{"mode":"0666","uid": "0","gid":3}', gid=3),
    Odd(name="gid as a truth", value=b'{"mode":"0660","gid": true,"uid":3}', uid=3),
    Odd(name="gid with a point", value=b'{"mode":"0660","gid": 1.0}'),
    Odd(
        name="a mode beside a bad uid", value=b'{"mode":"0400","uid":[]}', mode=stat.S_IFREG | 0o400
    ),
    Odd(name="an unknown type", value=b'{"mode":"0666","type": "device"}'),
    Odd(name="a type that is a list", value=b'{"mode":"0666","type": []}'),
    Odd(name="upper case", value=b'{"Mode":"0600"}', mode=_OPEN),
)

OTHERS: Final = (
    Odd(name="nothing", value=b"{}", mode=_OPEN),
    Odd(name="unknown fields", value=b'{"flags":{"a":[1,null]}}', mode=_OPEN),
    Odd(name="a field called unknown", value=b'{"unknown":{"mode":"0600"}}', mode=_OPEN),
    Odd(name="not a number", value=b'{"z":NaN,"y":-Infinity}', mode=_OPEN),
    Odd(
        name="mtime with a point",
        value=b'{"mode":"0604","mtime_ns": 1.5}',
        mode=stat.S_IFREG | 0o604,
    ),
    Odd(
        name="mtime beyond all",
        value=b'{"mode":"0604","mtime_ns": 9' + b"0" * 40 + b"}",
        mode=stat.S_IFREG | 0o604,
    ),
    Odd(
        name="mtime of no revision",
        value=b'{"mode":"0604","mtime_ns": 1, "mtime_revision": 0}',
        mode=stat.S_IFREG | 0o604,
    ),
    Odd(name="atime as text", value=b'{"mode":"0604","atime_ns":"now"}', mode=stat.S_IFREG | 0o604),
    Odd(name="xattrs as a list", value=b'{"mode":"0604","xattrs": []}', mode=stat.S_IFREG | 0o604),
    Odd(
        name="xattrs of all kinds",
        value=b'{"xattrs":{"user.a":"Yg==","user.b":1,"user.c":"?","user.\\ud800":"","x":"",'
        b'"user.\\u0000":"","trusted.a":"","user.etcd.key":"","user.etcdfs.wait.1":"","user.'
        + b"n" * 251
        + b'":"","user.":"","user.z":"Yg=="}}',
        mode=_OPEN,
        xattrs=(b"user.a", b"user.", b"user.z"),
    ),
    Odd(
        name="an xattr that is too large",
        value=b'{"xattrs":{"user.a":"' + b"A" * 87_384 + b'","user.z":""}}',
        mode=_OPEN,
        xattrs=(b"user.z",),
    ),
    Odd(
        name="a link beside a bad mode",
        value=b'{"mode":7,"type":"symlink"}',
        mode=stat.S_IFLNK | 0o777,
    ),
)

ODD: Final = (*NO_RECORD, *ACCESS, *OTHERS)

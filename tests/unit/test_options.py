"""Options as text, as values, and as JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcdfs.cli.option_parsing import VALUED, parse_option_list, read_options
from etcdfs.cli.option_values import (
    PREFIX_MAX,
    parse_endpoint,
    parse_endpoints,
    parse_flag,
    parse_mode,
    parse_prefix,
    parse_seconds,
    parse_size,
)
from etcdfs.errors import (
    CommandError,
    EndpointError,
    PrefixError,
    TlsError,
    UsageError,
)
from etcdfs.options import (
    OPTIONS,
    Endpoint,
    MountOptions,
    Security,
    decode_options,
    encode_options,
)

# --- endpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("http://127.0.0.1:2379", Endpoint("127.0.0.1", 2379)),
        ("127.0.0.1:2379", Endpoint("127.0.0.1", 2379)),
        ("HTTP://etcd-0.example.com:2379/", Endpoint("etcd-0.example.com", 2379)),
        ("localhost:1", Endpoint("localhost", 1)),
        ("etcd_1:65535", Endpoint("etcd_1", 65535)),
        ("[::1]:2379", Endpoint("::1", 2379)),
        ("http://[fe80::1%eth0]:2379", Endpoint("fe80::1%eth0", 2379)),
    ],
)
def test_endpoint_is_understood(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty"),
        ("localhost", "has no port"),
        ("http://localhost", "has no port"),
        ("localhost:", "has no port"),
        ("localhost:0", "port 0"),
        ("localhost:65536", "no valid port"),
        ("localhost:http", "no valid port"),
        ("::1:2379", "without its brackets"),
        ("[::1:2379", "no valid IPv6"),
        ("[::g]:2379", "no valid IPv6"),
        (":2379", "no valid host name"),
        ("-x:2379", "no valid host name"),
        ("unixs:///run/etcd.sock", "Unix socket with TLS"),
        ("unix://run/etcd.sock", "no absolute path"),
        ("unix:///", "no absolute path"),
        ("unix:///a%00b", "no absolute path"),
        ("unix:///a%2cb", "has a comma"),
        ("ftp://localhost:2379", "unknown scheme 'ftp'"),
        ("/run/etcd.sock", "is a path"),
        ("localhost:2379/v3", "goes on after the port"),
        ("localhost:2379?x=y", "goes on after the port"),
        ("local host:2379", "blank or control character"),
        ("localhost\n:2379", "blank or control character"),
    ],
)
def test_endpoint_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(EndpointError, match=complaint):
        parse_endpoint(text)


@pytest.mark.parametrize("name", ["password", "passwd", "Password", "ro", "user:password"])
def test_an_option_that_is_refused_does_not_repeat_its_value(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_option_list(f"cache,{name}=secret")
    assert f"-o {name} is refused" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_endpoint_with_a_password_does_not_repeat_it() -> None:
    with pytest.raises(EndpointError) as caught:
        parse_endpoint("http://root:secret@localhost:2379")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["/run/etcd.sock", "/a b/client:0", "/%/ü@\udcff"])
def test_a_unix_socket_is_written_as_it_is_read(path: str) -> None:
    endpoint = Endpoint(path, 0)
    assert parse_endpoints(str(endpoint)) == (endpoint,)


def test_a_unix_socket_has_no_tls() -> None:
    with pytest.raises(TlsError, match="Unix socket, and --cacert asks for TLS"):
        parse_endpoint("unix:///run/etcd.sock", tls="--cacert")


@pytest.mark.parametrize("text", ["https://etcd:2379", "HTTPS://etcd:2379", "https://etcd:2379/"])
def test_https_is_tls(text: str) -> None:
    assert parse_endpoint(text) == Endpoint("etcd", 2379, secure=True)


def test_an_endpoint_without_a_scheme_is_as_secure_as_the_rest() -> None:
    assert parse_endpoint("a:1", tls="--cacert") == Endpoint("a", 1, secure=True)
    with pytest.raises(TlsError, match="plain text, and --cacert asks for TLS"):
        parse_endpoint("http://a:1", tls="--cacert")


def test_endpoints_keep_their_order_and_count_once() -> None:
    assert parse_endpoints("b:2, http://a:1,b:2") == (Endpoint("b", 2), Endpoint("a", 1))


def test_endpoints_with_an_empty_one_are_refused() -> None:
    with pytest.raises(EndpointError, match="empty"):
        parse_endpoints("a:1,,b:2")


@given(
    host=st.one_of(
        st.text("abc-_.09", min_size=1).map(lambda middle: f"h{middle}h"),
        st.ip_addresses(v=4).map(str),
        st.ip_addresses(v=6).map(str),
    ),
    port=st.integers(1, 65535),
    scheme=st.sampled_from(["", "http://"]),
)
def test_endpoint_reads_what_it_writes(host: str, port: int, scheme: str) -> None:
    endpoint = Endpoint(host, port)
    assert parse_endpoint(f"{scheme}{endpoint}") == endpoint


@given(st.text())
def test_endpoints_never_fail_otherwise(text: str) -> None:
    try:
        endpoints = parse_endpoints(text)
    except (EndpointError, TlsError) as exc:
        assert "\n" not in str(exc)  # noqa: PT017 -- either outcome is fine
    else:
        assert endpoints


# --- the prefix -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "normal"),
    [
        (b"", b""),
        (b"/", b"/"),
        (b"/app", b"/app/"),
        (b"/app/", b"/app/"),
        (b"app", b"app/"),
        (b"/a/b", b"/a/b/"),
        (b"/a\xff", b"/a\xff/"),
        (b"/.etcd", b"/.etcd/"),
        (b".etcdfs", b".etcdfs/"),
        (b"/a/.etcdfs", b"/a/.etcdfs/"),
    ],
)
def test_prefix_ends_in_one_slash(prefix: bytes, normal: bytes) -> None:
    assert parse_prefix(prefix) == normal


@pytest.mark.parametrize(
    ("prefix", "complaint"),
    [
        (b"//", "empty component"),
        (b"/a//b", "empty component"),
        (b"/a//", "empty component"),
        (b"a/./b", "'.' or '..'"),
        (b"..", "'.' or '..'"),
        (b"/..", "'.' or '..'"),
        (b"/a\0b", "NUL"),
        (b"/.etcdfs", "belongs to etcdfs"),
        (b"/.etcdfs/", "belongs to etcdfs"),
        (b"/.etcdfs/attributes", "belongs to etcdfs"),
        (b"x" * PREFIX_MAX, f"{PREFIX_MAX + 1} bytes"),
    ],
)
def test_prefix_is_refused(prefix: bytes, complaint: str) -> None:
    with pytest.raises(PrefixError, match=complaint):
        parse_prefix(prefix)


@given(st.one_of(st.binary(), st.text(alphabet="a./\0", max_size=8).map(str.encode)))
def test_prefix_normalisation_is_stable(prefix: bytes) -> None:
    try:
        normal = parse_prefix(prefix)
    except PrefixError:
        return
    assert parse_prefix(normal) == normal
    assert normal in {prefix, prefix + b"/"}


# --- scalars --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64K", 64 * 1024),
        ("64k", 64 * 1024),
        ("64M", 64 * 1024**2),
        ("1GiB", 1024**3),
        ("1Gi", 1024**3),
        ("1GB", 1000**3),
        ("2T", 2 * 1024**4),
    ],
)
def test_size_is_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "64 M", "64X", "1_0", "9" * 5000, "9999999T"]
)
def test_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "mode"), [("644", 0o644), ("0644", 0o644), ("0o755", 0o755), ("0", 0)]
)
def test_mode_is_octal(text: str, mode: int) -> None:
    assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["", "u+x", "8", "-1", "04755", "1777", "0x1ff"])
def test_mode_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mode(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5.0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("0", 0.0),
        ("500ms", 0.5),
        ("5s", 5.0),
        ("1m30s", 90.0),
    ],
)
def test_seconds_are_understood(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "s", "-1", "nan", "inf", "1e3", "1_0", "5 s", "5d", "1.2.3s", "9999999h", "9" * 400],
)
def test_seconds_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "flag"), [("on", True), ("TRUE", True), ("0", False), ("no", False)]
)
def test_flag_is_understood(text: str, flag: bool) -> None:
    assert parse_flag(text) is flag


def test_flag_is_refused() -> None:
    with pytest.raises(UsageError):
        parse_flag("maybe")


# --- option lists ---------------------------------------------------------------------------


MOUNT_8 = """
    async atime noatime auto noauto defaults diratime nodiratime dirsync exec noexec group nogroup
    iversion noiversion mand nomand _netdev nofail relatime norelatime strictatime nostrictatime
    lazytime nolazytime nosuid nodev silent loud owner noowner ro rw sync user nouser users nousers
    nosymfollow context=system_u:object_r:removable_t fscontext=x defcontext=x rootcontext=x
    x-systemd.automount x-systemd.requires=network-online.target x-initrd.mount x-gvfs-hide
    X-mount.mkdir X-mount.mkdir=0700 X-mount.owner=me X-mount.subdir=a X-mount.noloop
    comment=mine uhelper=udisks2
"""
"""The options that mount(8) of util-linux 2.41 has for every file system, and systemd.mount(5)."""


@pytest.mark.parametrize("option", MOUNT_8.split())
def test_options_of_mount_8_are_passed_on_or_accepted(option: str) -> None:
    listed = parse_option_list(option)
    assert listed.texts.keys() <= {"read-only"}
    assert listed.fuse_options in {(), (option,)}


def test_option_list_passes_on_what_the_kernel_sees_to() -> None:
    kernels = ("nosymfollow", "context=a:b", "noexec", "max_read=4096")
    assert parse_option_list(",".join(kernels)).fuse_options == kernels


def test_user_has_another_name_in_fstab() -> None:
    assert parse_option_list("username=app,user").texts == {"user": "app"}
    with pytest.raises(UsageError, match="others could see it"):
        parse_option_list("username=app:secret")


def test_option_list_of_an_fstab_line() -> None:
    listed = parse_option_list(
        "defaults,_netdev,nofail,x-systemd.automount,ro,noexec,nosuid,allow_other,cache,"
        "prefix=/app,cache_size=64M,fsname=config,comment=mine,noatime,noexec"
    )
    assert listed.texts == {
        "read-only": "on",
        "allow-other": "on",
        "cache": "on",
        "prefix": "/app",
        "cache-size": "64M",
    }
    assert listed.fuse_options == ("noexec", "nosuid", "fsname=config", "noatime")


def test_option_list_repeats_endpoints() -> None:
    assert parse_option_list("endpoints=a:1,endpoints=b:2").texts == {"endpoints": "a:1,b:2"}


def test_option_list_lets_the_last_word_win() -> None:
    assert parse_option_list("ro,rw,cache,no-cache").texts == {"read-only": "off", "cache": "off"}


def test_option_list_has_every_option() -> None:
    for name in VALUED:
        assert parse_option_list(f"{name}=x").texts == {name: "x"}
    flags = parse_option_list(
        "ro,allow_other,no_attrs,no_control_dir,cache,embedded,insecure_skip_tls_verify,"
        "offline_start"
    ).texts
    assert flags.keys() == OPTIONS.keys() - VALUED - {"password"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("size=3", "no such option"),
        ("rro", "no such option"),
        ("prefix", "needs a value"),
        ("ro=1", "no value|no such option"),
        ("suid", "never setuid"),
        ("auto_unmount", "deleted data"),
        ("remount", "mount again"),
        ("password=secret", "others could see it"),
        ("user=root:secret", "others could see it"),
        ("foreground", "no such option"),
    ],
)
def test_option_list_refuses_the_rest(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_option_list(f"ro,{text}")


# --- all together ---------------------------------------------------------------------------

_SOME = {"endpoints": "a:1"}


def test_options_not_said_keep_their_defaults() -> None:
    assert read_options("/m", _SOME) == MountOptions(mountpoint="/m", endpoints=(Endpoint("a", 1),))


def test_every_option_changes_its_field() -> None:
    texts = {
        "endpoints": "a:1",
        "prefix": "/p\udcff",  # a byte that is no UTF-8, as the command line gives it
        "cache": "on",
        "read-only": "on",
        "cache-size": "1M",
        "uid": "7",
        "gid": "8",
        "file-mode": "600",
        "dir-mode": "700",
        "umask": "077",
        "allow-other": "on",
        "no-attrs": "on",
        "timeout": "1",
        "kernel-timeout": "0",
        "settle-timeout": "3",
        "max-file-size": "2M",
        "write-buffer": "3M",
        "embedded": "off",
        "cacert": "/ca",
        "cert": "/cert",
        "key": "/key",
        "insecure-skip-tls-verify": "on",
        "insecure-transport": "off",
        "server-name": "etcd",
        "user": "u",
        "password-file": "/password",
        "log-level": "debug",
    }
    assert read_options("/m", texts, ("noexec",)) == MountOptions(
        mountpoint="/m",
        endpoints=(Endpoint("a", 1, secure=True),),
        security=Security(
            cacert="/ca",
            cert="/cert",
            key="/key",
            skip_verify=True,
            server_name="etcd",
            user="u",
            password_file="/password",
        ),
        prefix=b"/p\xff/",
        cache=True,
        read_only=True,
        cache_size=1024**2,
        uid=7,
        gid=8,
        file_mode=0o600,
        dir_mode=0o700,
        umask=0o077,
        allow_other=True,
        no_attrs=True,
        timeout_s=1.0,
        kernel_timeout_s=0.0,
        settle_timeout_s=3.0,
        max_file_size=2 * 1024**2,
        write_buffer=3 * 1024**2,
        fuse_options=("noexec",),
    )


def test_a_cache_takes_a_state_dir() -> None:
    options = read_options("/m", {**_SOME, "cache": "on", "state-dir": "/d", "offline-start": "on"})
    assert (options.state_dir, options.offline_start) == ("/d", True)


def test_embedded_takes_a_data_dir() -> None:
    options = read_options("/m", {"embedded": "on", "data-dir": "/d"})
    assert (options.embedded, options.data_dir, options.endpoints) == (True, "/d", ())


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ({"embedded": "on", "endpoints": "a:1"}, "etcd of its own"),
        ({"embedded": "on", "cacert": "/ca"}, "without certificates or users"),
        ({}, "no endpoints"),
        ({"endpoints": "a:1", "data-dir": "/d"}, "needs --embedded"),
        ({"endpoints": "a:1", "state-dir": "/d"}, "what --cache holds"),
        ({"embedded": "on", "cache": "on", "state-dir": "/d"}, "may be away"),
        ({"endpoints": "a:1", "cache": "on", "offline-start": "on"}, "it needs that"),
        ({**_SOME, "timeout": "0"}, "--timeout: it must be more than 0"),
        ({**_SOME, "max-file-size": "0"}, "--max-file-size: it must be more than 0"),
        ({**_SOME, "uid": "root"}, "--uid: 'root' is not a numeric id"),
        ({**_SOME, "gid": "4294967295"}, "--gid: .* is not a numeric id"),
        ({**_SOME, "cache-size": "x"}, "--cache-size: 'x' is not a size"),
    ],
)
def test_options_are_refused(texts: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_options("/m", texts)


@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.text()))
def test_options_fail_only_as_commands_do(texts: dict[str, str]) -> None:
    try:
        options = read_options("/m", texts)
    except CommandError:
        return
    assert options.mountpoint == "/m"


# --- JSON -----------------------------------------------------------------------------------

# What the operating system hands over: any bytes but NUL, those that are no UTF-8 as surrogates.
paths = st.binary(max_size=30).map(lambda raw: raw.decode(errors="surrogateescape"))
seconds = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
modes = st.integers(0, 0o777)
sizes = st.integers(0, 2**63 - 1)

maybe_path = st.one_of(st.none(), paths)

mount_options = st.builds(
    MountOptions,
    mountpoint=paths,
    endpoints=st.lists(st.builds(Endpoint, st.text(), st.integers(1, 65535), st.booleans())).map(
        tuple
    ),
    security=st.builds(
        Security,
        cacert=maybe_path,
        cert=maybe_path,
        key=maybe_path,
        skip_verify=st.booleans(),
        server_name=maybe_path,
        user=maybe_path,
        password=maybe_path,
        password_file=maybe_path,
    ),
    prefix=st.binary(),
    cache=st.booleans(),
    read_only=st.booleans(),
    cache_size=sizes,
    uid=sizes,
    gid=sizes,
    file_mode=modes,
    dir_mode=modes,
    umask=modes,
    allow_other=st.booleans(),
    no_attrs=st.booleans(),
    timeout_s=seconds,
    kernel_timeout_s=seconds,
    settle_timeout_s=seconds,
    max_file_size=sizes,
    write_buffer=sizes,
    embedded=st.booleans(),
    data_dir=st.one_of(st.none(), paths),
    metrics_listen=st.one_of(st.none(), st.tuples(st.text(), sizes)),
    fuse_options=st.lists(st.text()).map(tuple),
)


@given(mount_options)
def test_json_is_exact(options: MountOptions) -> None:
    assert decode_options(json.loads(json.dumps(encode_options(options)))) == options

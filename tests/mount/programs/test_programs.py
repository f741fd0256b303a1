"""Programs people use every day. On tmpfs, too, so that what is expected of them is real."""

import mailbox
import os
import shelve
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dbm import dumb
from pathlib import Path

import pytest

from tests.mount.lab import LONG_S, sh

pytestmark = [pytest.mark.etcd, pytest.mark.fuse]


def contents(directory: Path) -> dict[str, bytes | None]:
    """Return every path below a directory, with its content; None for directories."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a small tree on a local file system."""
    home = tmp_path / "source"
    (home / "conf.d" / "empty").mkdir(parents=True)
    (home / "main.conf").write_bytes(b"listen 443;\n")
    (home / "conf.d" / "10-a.conf").write_bytes(b"a\n" * 1000)
    (home / "conf.d" / "blob").write_bytes(bytes(range(256)) * 300)
    (home / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (home / "run.sh").chmod(0o755)
    (home / "link").symlink_to("main.conf")
    for path in home.rglob("*"):
        os.utime(path, ns=(1_600_000_000_123_456_789,) * 2, follow_symlinks=False)
    return home


# --- copying --------------------------------------------------------------------------------


@pytest.mark.programs("rsync")
def test_rsync_there_and_back(place: Path, source: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    transfer = "rsync -a --delete --itemize-changes"
    assert sh(place, f"{transfer} {source}/ there/") != ""
    assert sh(place, f"{transfer} {source}/ there/") == ""
    assert sh(place, f"{transfer} there/ {back}/") != ""
    assert sh(place, f"{transfer} there/ {back}/") == ""
    assert sh(place, f"{transfer} --checksum {back}/ {source}/") == ""
    (source / "main.conf").write_bytes(b"listen 8443;\n")
    (source / "run.sh").unlink()
    changes = sh(place, f"{transfer} {source}/ there/").splitlines()
    assert [line for line in changes if not line.startswith(".d")] == [
        "*deleting   run.sh",
        ">f.st...... main.conf",
    ]
    assert contents(place / "there") == contents(source)
    assert sorted(os.listdir(place)) == ["there"]


def test_tar_there_and_back(place: Path, source: Path, tmp_path: Path) -> None:
    sh(place, f"tar -C {source} -cf - . | tar -xpf - --same-order; tar -cf {tmp_path}/t.tar .")
    sh(place, f"tar -df {tmp_path}/t.tar; tar -C {source} -df {tmp_path}/t.tar")
    assert contents(place) == contents(source)
    sh(place, f"tar -czf all.tgz -C {source} .; mkdir x; tar -C x -xzf all.tgz; diff -r x {source}")


def test_cp_and_install(place: Path, source: Path) -> None:
    sh(place, f"cp -a {source} copy; diff -r --no-dereference copy {source}")
    assert (place / "copy" / "run.sh").stat().st_mode == (source / "run.sh").stat().st_mode
    assert (place / "copy" / "main.conf").stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert os.readlink(place / "copy" / "link") == "main.conf"
    sh(place, "cp -a copy again; diff -r --no-dereference copy again; cp -u copy/main.conf again/")
    sh(place, f"install -D -m 0750 {source}/run.sh bin/run; install -d -m 0700 var")
    assert sh(place, "bin/run; stat -c %a bin/run var").split() == ["ran", "750", "700"]
    sh(place, "cp --sparse=always copy/conf.d/blob sparse; cmp copy/conf.d/blob sparse")
    sh(place, "ln -s copy/main.conf l; test -L l; cp -L l real; cmp real copy/main.conf")
    sh(place, "cp --backup=numbered copy/run.sh real; test -f real.~1~; rm -r copy again")


def test_mv_of_trees(place: Path, source: Path, tmp_path: Path) -> None:
    sh(place, f"cp -a {source} a; mv a b; mkdir c; mv b c/; mv c/b {tmp_path}/out")
    assert contents(tmp_path / "out") == contents(source)
    sh(place, f"mv {tmp_path}/out in; mv -T in c")
    assert contents(place / "c") == contents(source)
    assert os.listdir(place) == ["c"]


# --- editing --------------------------------------------------------------------------------


def test_sed_and_other_editors_in_place(place: Path) -> None:
    (place / "f").write_text("one\ntwo\nthree\n")
    (place / "f").chmod(0o640)
    sh(place, "sed -i.bak 's/two/2/' f; sed -i '1d' f; perl -pi -e 's/three/3/' f")
    assert (place / "f").read_text() == "2\n3\n"
    assert (place / "f.bak").read_text() == "one\ntwo\nthree\n"
    sh(place, "printf '%s\\n' '$a' end . w q | ed -s f 2>/dev/null || echo end >> f")
    sh(place, "sort -r f -o f; awk -i inplace '{print NR, $0}' f 2>/dev/null || true")
    assert (place / "f").read_text().split()[-1] == "2"
    assert set(os.listdir(place)) == {"f", "f.bak"}


@pytest.mark.programs("patch")
def test_patch(place: Path) -> None:
    (place / "f").write_text("one\ntwo\nthree\n")
    (place / "f").chmod(0o640)
    sh(place, "sed s/two/2/ f > g; diff -u f g > p || true; patch -b f p; cmp f g; patch -R f p")
    assert (place / "f").read_text() == (place / "f.orig").read_text() == "one\ntwo\nthree\n"
    assert (place / "f").stat().st_mode & 0o777 == 0o640
    (place / "p").write_text("--- /dev/null\n+++ b/x/new\n@@ -0,0 +1 @@\n+hi\n")
    sh(place, "patch -p1 < p")
    assert (place / "x" / "new").read_text() == "hi\n"
    sh(place, "patch -p1 -R < p")
    assert not (place / "x" / "new").exists()


@pytest.mark.programs("jq", "yq")
def test_jq_and_yq(place: Path) -> None:
    (place / "c.json").write_text('{"listen": 443}')
    sh(place, "jq '.listen = 8443' c.json > new && mv new c.json")
    assert sh(place, "jq .listen c.json").strip() == "8443"
    (place / "c.yaml").write_text("listen: 443\nname: x\n")
    sh(
        place,
        "yq --help 2>&1 | grep -q -- --in-place && f=-y || f=; yq -i $f '.listen = 8443' c.yaml",
    )
    assert "8443" in (place / "c.yaml").read_text()
    assert sorted(os.listdir(place)) == ["c.json", "c.yaml"]


# --- building -------------------------------------------------------------------------------


@pytest.mark.programs("make", "gcc")
def test_make(place: Path) -> None:
    (place / "main.c").write_text('#include "part.h"\nint main(void) { return part(); }\n')
    (place / "part.h").write_text("int part(void);\n")
    (place / "part.c").write_text('#include "part.h"\nint part(void) { return 0; }\n')
    (place / "Makefile").write_text(
        "CC = gcc\nprog: main.o part.o\n\t$(CC) -o $@ $^\n%.o: %.c part.h\n\t$(CC) -c -o $@ $<\n"
    )
    assert sh(place, "make -j2").count("gcc") == 3
    assert "up to date" in sh(place, "make; ./prog")
    (place / "part.c").write_text('#include "part.h"\nint part(void) { return 1 - 1; }\n')
    assert sh(place, "make").count("gcc") == 2
    sh(place, "./prog; cp prog again; ./again; rm *.o; ar rc lib.a 2>/dev/null; touch -r main.c x")
    assert sh(place, "test x -nt prog || echo older").strip() == "older"


GIT_SETUP = """
git() { command git -c user.name=a -c user.email=a@b -c init.defaultBranch=main \\
  -c gc.autoDetach=false -c advice.detachedHead=false "$@"; }
"""


@pytest.mark.programs("git")
def test_git_commits_and_branches(place: Path) -> None:
    sh(
        place,
        GIT_SETUP
        + """
        git init -q
        for n in 1 2 3; do echo $n > f$n; done; chmod +x f1; ln -s f1 link
        git add .; git commit -qm one
        git checkout -qb branch; echo 2 >> f1; git mv f2 g2; git commit -qam two
        git checkout -q main; test -f f2; test "$(cat f1)" = 1; test -x f1; test -L link
        git merge -q branch; test ! -e f2; test "$(cat g2)" = 2
        test -z "$(git status --porcelain)"
        """,
    )


@pytest.mark.programs("git")
@pytest.mark.many_calls
def test_git_clones_and_collects_garbage(place: Path) -> None:
    sh(
        place,
        GIT_SETUP
        + """
        git init -q r; cd r
        mkdir d; echo x > d/x; for n in 1 2 3; do echo $n > f$n; git add .; git commit -qm $n; done
        git checkout -qb branch; echo b > b; git add b; git commit -qm b; git checkout -q main
        echo change >> f1; git stash -q; git stash pop -q; git commit -qam change; git tag v1
        git gc -q; git fsck --strict; test "$(git rev-list --count HEAD)" = 4
        git checkout -q branch; git rebase -q main; git checkout -q main
        cd ..; git clone -q r c; git clone -q --no-local r n
        diff -r --exclude=.git r c; diff -r --exclude=.git r n
        cd c; echo clone > f3; git commit -qam clone; git push -q origin main:from-clone
        cd ../r; git merge -q from-clone; test "$(cat f3)" = clone
        git worktree add -q ../w branch; git worktree remove ../w
        git gc -q --prune=now --aggressive; git fsck --strict; test -z "$(git status --porcelain)"
        """,
        patience_s=LONG_S,
    )


# --- databases ------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "memory", "wal"])
def test_sqlite(place: Path, journal: str) -> None:
    path = place / "db"
    with closing(sqlite3.connect(path)) as db:
        assert db.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        db.execute("create table t (n integer primary key, s text)")
        for n in range(5):
            with db:
                db.executemany("insert into t (s) values (?)", [(f"{n}",)] * 20)
        db.execute("insert into t (s) values ('rolled back')")
        db.rollback()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        assert db.execute("select count(*) from t").fetchone() == (100,)
        db.execute("vacuum")
    assert path.read_bytes().startswith(b"SQLite format 3\0")


def test_sqlite_of_two_connections(place: Path) -> None:
    path = place / "db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("create table t (n integer)")
        db.execute("insert into t values (0)")

    def count(_: int) -> None:
        with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
            for _ in range(5):
                db.execute("begin immediate")
                db.execute("update t set n = n + 1")
                db.execute("commit")

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(count, range(3)))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("select n from t").fetchone() == (15,)


# --- locks ----------------------------------------------------------------------------------


@pytest.mark.programs("flock")
def test_flock_lets_one_in_at_a_time(place: Path) -> None:
    (place / "n").write_text("0")
    add = "n=$(cat n); echo $((n + 1)) > n"
    sh(place, f"for i in 1 2 3 4; do flock lock sh -euc '{add}; {add}; {add}' & done; wait")
    assert (place / "n").read_text() == "12\n"
    sh(place, "( flock 9; ! flock --nonblock --shared lock true ) 9> lock")


# --- Python ---------------------------------------------------------------------------------


def test_dbm_and_shelve(place: Path) -> None:
    with closing(dumb.open(str(place / "dumb"), "c")) as db:
        for n in range(50):
            db[str(n)] = b"value" * n
        del db["7"]
    with closing(dumb.open(str(place / "dumb"), "r")) as db:
        assert sorted(map(int, db.keys())) == [n for n in range(50) if n != 7]
        assert db["49"] == b"value" * 49
    with shelve.open(str(place / "shelf"), writeback=True) as shelf:
        shelf["list"] = [1]
        shelf["list"].append(2)
    with shelve.open(str(place / "shelf"), flag="r") as shelf:
        assert shelf["list"] == [1, 2]


def test_shutil(place: Path, source: Path) -> None:
    shutil.copytree(source, place / "a", symlinks=True)
    shutil.copy2(place / "a" / "main.conf", place / "copy")
    assert (place / "copy").stat().st_mtime_ns == (source / "main.conf").stat().st_mtime_ns
    shutil.move(place / "a", place / "b")
    assert contents(place / "b") == contents(source)
    archive = shutil.make_archive(str(place / "all"), "zip", place / "b")
    shutil.unpack_archive(archive, place / "c")
    shutil.rmtree(place / "b")
    assert shutil.disk_usage(place).total > 0
    assert sorted(os.listdir(place)) == ["all.zip", "c", "copy"]


def test_tempfile(place: Path) -> None:
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"value")
        file.seek(0)
        assert file.read() == b"value"
    with tempfile.NamedTemporaryFile(dir=place) as named:
        named.write(b"value")
        named.flush()
        assert Path(named.name).read_bytes() == b"value"
    with tempfile.TemporaryDirectory(dir=place) as directory:
        (Path(directory) / "f").touch()
    descriptor, name = tempfile.mkstemp(dir=place)
    os.close(descriptor)
    assert Path(name).stat().st_mode & 0o777 == 0o600
    Path(name).unlink()
    assert os.listdir(place) == []


@contextmanager
def locked(box: "mailbox.Mailbox[mailbox.Message]") -> Iterator[None]:
    box.lock()
    try:
        yield
    finally:
        box.flush()
        box.unlock()


def test_mailbox_maildir(place: Path) -> None:
    box = mailbox.Maildir(place / "maildir")
    keys = [box.add(f"Subject: {n}\n\nbody {n}\n") for n in range(3)]
    message = box[keys[0]]
    message.set_flags("S")
    box[keys[0]] = message
    box.remove(keys[1])
    found = mailbox.Maildir(place / "maildir")
    assert sorted(m["subject"] for m in found) == ["0", "2"]
    assert {m["subject"]: m.get_flags() for m in found} == {"0": "S", "2": ""}


def test_mailbox_mbox(place: Path) -> None:
    box = mailbox.mbox(place / "mbox")
    with locked(box):
        for n in range(3):
            box.add(f"Subject: {n}\n\nbody {n}\n")
    with locked(box):
        box.discard(box.keys()[1])
    box.close()
    with closing(mailbox.mbox(place / "mbox")) as again:
        assert [message["subject"] for message in again] == ["0", "2"]
    assert os.listdir(place) == ["mbox"]


# --- exercisers -----------------------------------------------------------------------------


@pytest.mark.programs("fio")
@pytest.mark.parametrize("engine", ["psync", "mmap"])
def test_fio_verifies_what_it_wrote(place: Path, engine: str) -> None:
    sh(
        place,
        f"fio --name=v --directory=. --ioengine={engine} --rw=randrw --bs=4k --size=256k"
        " --verify=crc32c --verify_fatal=1 --do_verify=1 --loops=2 --fsync=20 --nrfiles=2"
        " --allow_file_create=1 --fallocate=none --output=/dev/null",
    )


@pytest.mark.programs("stress-ng")
@pytest.mark.many_calls
def test_stress_ng(place: Path) -> None:
    stressors = ("dentry", "rename", "dir", "lockf", "flock", "utime", "access", "chmod", "getdent")
    each = " ".join(f"--{name} 1 --{name}-ops 10" for name in stressors)
    sh(
        place,
        f"stress-ng --temp-path . {each} --dentries 50 --dir-dirs 64 --verify --timeout 30"
        " --oomable",
        patience_s=LONG_S,
    )

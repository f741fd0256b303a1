"""Mount an etcd v3 keyspace as a directory tree.

A file is a key, its content is the key's value, directories are the `/` in key names. What a mount
promises is in docs/semantics.md, why it is built as it is in docs/architecture.md. This is the
primer for whoever reads the code.


The difficulties
----------------

A file system over etcd would be short if each call could ask etcd. With `--cache` it does not, and
with that come five difficulties, each answered by one type:

1. A request that reaches a FUSE daemon costs many times what tmpfs costs. So the kernel is given
   answers to keep, and whatever makes one untrue must invalidate it: no less, or programs read
   what is old; no more, or the cache is for nothing. `tree.update.Update` works out which.
2. A revision may change many keys, but the kernel can be told of one at a time. Whoever has seen
   one new value must not see another old one. `mirror.applier.Applier` takes each batch through
   *plan, invalidate, apply*.
3. A value that changes while it is read would be torn. `tree.inodes.File` is one version of a key
   for as long as somebody has it open; a newer version is another inode.
4. A watch can end, lie, lose events, or belong to another history. `mirror.state_machine` decides
   what is believed: messages in, steps out, no I/O. `consistency.audit` checks all of it now and
   then, whatever the watch said.
5. An answer that is lost leaves a write that may or may not have happened.
   `keyspace.outcomes.ResolvingStore` looks what became of it, and never sends it twice.


The life of a read
------------------

`cat app/x`: the kernel has dentry and attributes cached, or sends LOOKUP.
`fuse.operations.Operations` hands it to `vfs.filesystem.Filesystem`, which has the view
(`tree.view.View`) revalidate the name. The mirror has nothing to do but to say whether it may be
shown (`consistency.staleness`); `uncached.Uncached` asks etcd. The tree's node becomes attributes
(`vfs.attributes`), which the kernel may keep. OPEN makes a handle (`files.handles`) on this
version, and its value is handed to the kernel's page cache; READ is seldom needed.


The life of a remote change
---------------------------

`etcdctl put /app/x 2`: the watch (`etcd.watch`) brings whole revisions to `mirror.watch_session`,
the state machine says *apply*, and `mirror.driver` hands them on, to the applier. `Update.plan` works
out what each name becomes. `mirror.invalidator` and `fuse.notify` have the kernel forget what that
makes untrue, from threads of their own, as it may block; lookups still answer the old state, with
no time to live. Then the plan is made anew and applied, all at once, with no `await` in between.
Whoever looks from now on finds the new revision.


The life of a write
-------------------

`echo 3 > app/x`: OPEN with O_TRUNC and WRITE change a buffer (`files.write_buffer`), which
programs on this mount see. FLUSH, at close(2), has `files.writeback.Writeback` put it: one
transaction, with compares that say what must still be so, and with the attribute record that goes
along (`files.put_attributes`). Before it is sent, an *intent* says what event will come of it, so
that `Update.plan` knows it as our own, and the file keeps its inode. The call returns when the
mirror has reached the revision.


Glossary
--------

================  ================================================================================
attribute record  mode, owner, times, xattrs of a key that differ from the defaults: JSON under a
                  *record key* in `/.etcdfs/attrs/`
audit             comparison of the mirror with etcd at one revision
dentry            a name in a directory, as the kernel caches it
door              the one package that imports a foreign library
history check     reading back the last change that was applied, before a watch is resumed
intent            what this mount is about to change, so that its event is known as its own
key state         revisions, version, lease and size of a key: all but its value
lookup count      how many references to an inode the kernel holds, until it sends FORGET
marker            the key `d/`, which keeps the directory `d` when nothing is in it
plan              what a batch of events makes of the tree, before it is applied
relocation        an intent for what moves: a directory and all below it
revision          etcd's number of a change; all keys of a transaction have the same
version           of a key: its `mod_revision`
view              the port between system calls and the two ways of knowing what etcd holds
write buffer      what is written to a file and not yet in etcd
write-back        putting it there, at close(2) or fsync(2)
================  ================================================================================


Where to go
-----------

`keyspace` how keys are paths, and what is asked of etcd; `tree` what is known, and one step of it;
`consistency` what may be shown; `mirror` and `uncached` the two views; `files` open files and
write-back; `vfs` what each call means; `fuse` the kernel; `etcd` etcd; `snapshots` the last state
on disk; `process` processes, mountpoints and logs; `components` how a mount is put
together; `daemon` what runs behind it; `doctor` what may be wrong; `cli` the command line. Imports
point down only: docs/architecture.md has the layers, and a table of what to open for which kind of
change.
"""

__version__ = "0.1.0"

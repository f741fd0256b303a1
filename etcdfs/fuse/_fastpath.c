/* What pyfuse3 does not let a file system tell the kernel, and what it does not pass on.
 *
 * A request that reaches a FUSE daemon costs a wake-up, whatever it is written in; what the kernel
 * answers from its caches costs nothing. Linux would keep directory listings and symbolic links,
 * never ask for an opendir, nor for an open where nothing is written, and send no FLUSH for
 * readers, if it were told that it may. pyfuse3 has no way to say so, and drops what says exactly
 * what a caller wants:
 *
 *   opendir's and open's flags     https://github.com/libfuse/pyfuse3/issues/60
 *   the inode of a READ, READDIR   its handlers hand on the file handle only
 *   SETATTR's "now", XATTR_CREATE  it decides itself what they come to
 *
 * So this library stands between the two. It is loaded before pyfuse3, with its symbols visible to
 * all (RTLD_GLOBAL); hence the dynamic linker finds this fuse_session_new first when it binds
 * pyfuse3. That one hands libfuse a copy of pyfuse3's table of operations with a few of them
 * wrapped. Unless it was asked to (`wrap_next_session`), it
 * changes nothing. It can go when pyfuse3 has what is listed here.
 *
 * Concurrency: pyfuse3 takes requests on one thread, with the GIL. The operation of a request
 * makes a coroutine, which that thread begins to run before it takes the next request; so what
 * `flags` returns is of the request whose handler begins.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <fuse_lowlevel.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VISIBLE __attribute__((visibility("default")))

enum {
    EXACT = 1,    /* requests say all that the kernel said; always, if anything is wrapped */
    NOFLUSH = 2,  /* no FLUSH when what was opened for reading is closed */
    LISTINGS = 4, /* no OPENDIR, RELEASEDIR; listings stay until the directory's mtime changes */
    SYMLINKS = 8, /* targets of symbolic links stay, too */
    NO_OPEN = 16, /* no OPEN, FLUSH, RELEASE; a READ has its inode. For what is read only */
};

#define OUR_HANDLE UINT64_MAX /* etcdfs/fuse/replay.py, HANDLE */

static struct {
    int wanted; /* until a session is made */
    int in_use;
    struct fuse_lowlevel_ops real; /* pyfuse3's */
    int flags; /* of the last SETATTR or SETXATTR */
    uid_t reader; /* who made the last READ; with it comes a handle, and here that says nothing */
} door;

/* --- operations ------------------------------------------------------------------------------ */

static void wrap_init(void *userdata, struct fuse_conn_info *conn)
{
    door.real.init(userdata, conn);
    /* A listing is kept for as long as the mtime is the same, if the kernel looks at it. */
    if (!(conn->capable & FUSE_CAP_NO_OPENDIR_SUPPORT) || !(conn->want & FUSE_CAP_AUTO_INVAL_DATA))
        door.in_use &= ~LISTINGS;
    if (!(conn->capable & FUSE_CAP_CACHE_SYMLINKS))
        door.in_use &= ~SYMLINKS;
    /* Pages stay from one open to the next, for as long as size and mtime are the same. */
    if (!(conn->capable & FUSE_CAP_NO_OPEN_SUPPORT) || !(conn->want & FUSE_CAP_AUTO_INVAL_DATA))
        door.in_use &= ~NO_OPEN;
    if (door.in_use & SYMLINKS)
        conn->want |= FUSE_CAP_CACHE_SYMLINKS;
}

static void wrap_setattr(fuse_req_t req, fuse_ino_t inode, struct stat *attr, int to_set,
                         struct fuse_file_info *fi)
{
    door.flags = to_set;
    door.real.setattr(req, inode, attr, to_set, fi);
}

static void wrap_setxattr(fuse_req_t req, fuse_ino_t inode, const char *name, const char *value,
                          size_t size, int flags)
{
    door.flags = flags;
    /* Without flags: pyfuse3 would ask for the attribute first, and decide by that. */
    door.real.setxattr(req, inode, name, value, size, 0);
}

static void wrap_getxattr(fuse_req_t req, fuse_ino_t inode, const char *name, size_t size)
{
    /* The kernel asks for security.capability before each write; it need not wake Python. */
    if (strncmp(name, "user.", 5) != 0)
        fuse_reply_err(req, EOPNOTSUPP);
    else
        door.real.getxattr(req, inode, name, size);
}

static void wrap_open(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    if (door.in_use & NO_OPEN) {
        fuse_reply_err(req, ENOSYS); /* never again, and keep the pages (fs/fuse/file.c) */
        return;
    }
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 11)
    /* pyfuse3 answers with a copy of this, and leaves what it does not know as it is. */
    if (door.in_use & NOFLUSH && (fi->flags & (O_ACCMODE | O_TRUNC)) == O_RDONLY)
        fi->noflush = 1;
#endif
    door.real.open(req, inode, fi);
}

static void wrap_read(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset,
                      struct fuse_file_info *fi)
{
    door.reader = fuse_req_ctx(req)->uid;
    if (door.in_use & NO_OPEN)
        fi->fh = inode; /* as for READDIRPLUS below */
    door.real.read(req, inode, size, offset, fi);
}

/* With NO_OPEN no handle says what a WRITE is. Only we can have a file open for writing there (see
 * etcdfs/fuse/replay.py), but for who has mounted a copy of ours anew. */
static int may_write(fuse_req_t req, struct fuse_file_info *fi)
{
    if (!(door.in_use & NO_OPEN) || fi->fh != 0)
        return 1;
    fi->fh = OUR_HANDLE;
    return syscall(SYS_tgkill, getpid(), fuse_req_ctx(req)->pid, 0) == 0; /* a thread of ours */
}

static void wrap_write(fuse_req_t req, fuse_ino_t inode, const char *data, size_t size,
                       off_t offset, struct fuse_file_info *fi)
{
    if (may_write(req, fi))
        door.real.write(req, inode, data, size, offset, fi);
    else
        fuse_reply_err(req, EROFS);
}

static void wrap_write_buf(fuse_req_t req, fuse_ino_t inode, struct fuse_bufvec *data,
                           off_t offset, struct fuse_file_info *fi)
{
    if (may_write(req, fi))
        door.real.write_buf(req, inode, data, offset, fi);
    else
        fuse_reply_err(req, EROFS);
}

static void wrap_flush(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    if (door.in_use & NO_OPEN)
        fuse_reply_err(req, ENOSYS); /* never again: nothing is written here */
    else
        door.real.flush(req, inode, fi);
}

static void wrap_opendir(fuse_req_t req, fuse_ino_t inode, struct fuse_file_info *fi)
{
    if (door.in_use & LISTINGS)
        fuse_reply_err(req, ENOSYS); /* never again, and keep the listings (fs/fuse/file.c) */
    else
        door.real.opendir(req, inode, fi);
}

static void wrap_readdirplus(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset,
                             struct fuse_file_info *fi)
{
    if (door.in_use & LISTINGS)
        fi->fh = inode; /* 0 else, of which pyfuse3 makes nothing: it passes on no inode */
    door.real.readdirplus(req, inode, size, offset, fi);
}

static int wrap(const struct fuse_lowlevel_ops *operations, size_t size,
                struct fuse_lowlevel_ops *wrapped)
{
    /* A table that is larger than ours was compiled with another libfuse: nothing is touched. */
    if (!door.wanted || size > sizeof door.real)
        return 0;
    memset(&door.real, 0, sizeof door.real);
    memcpy(&door.real, operations, size);
    *wrapped = door.real;
    wrapped->init = wrap_init;
    wrapped->setattr = wrap_setattr;
    wrapped->setxattr = wrap_setxattr;
    wrapped->getxattr = wrap_getxattr;
    wrapped->open = wrap_open;
    wrapped->read = wrap_read;
    wrapped->flush = wrap_flush;
    if (door.real.write != NULL)
        wrapped->write = wrap_write;
    if (door.real.write_buf != NULL)
        wrapped->write_buf = wrap_write_buf;
    wrapped->opendir = wrap_opendir;
    wrapped->readdirplus = wrap_readdirplus;
    door.in_use = door.wanted;
    door.wanted = 0;
    return 1;
}

/* --- in place of libfuse's ------------------------------------------------------------------- */

/* RTLD_NEXT: libfuse, which this library is linked with. */

typedef struct fuse_session *session_new(struct fuse_args *, const struct fuse_lowlevel_ops *,
                                         size_t, void *);

#undef fuse_session_new /* a macro since libfuse 3.17; what was compiled before that calls this */
VISIBLE struct fuse_session *fuse_session_new(struct fuse_args *args,
                                              const struct fuse_lowlevel_ops *operations,
                                              size_t size, void *userdata)
{
    struct fuse_lowlevel_ops wrapped;
    session_new *real = (session_new *)dlvsym(RTLD_NEXT, "fuse_session_new", "FUSE_3.0");
    if (real == NULL)
        return NULL;
    if (wrap(operations, size, &wrapped))
        return real(args, &wrapped, sizeof wrapped, userdata);
    return real(args, operations, size, userdata);
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
typedef struct fuse_session *session_new_versioned(struct fuse_args *,
                                                   const struct fuse_lowlevel_ops *, size_t,
                                                   struct libfuse_version *, void *);

VISIBLE struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
                                                        const struct fuse_lowlevel_ops *operations,
                                                        size_t size,
                                                        struct libfuse_version *version,
                                                        void *userdata)
{
    struct fuse_lowlevel_ops wrapped;
    session_new_versioned *real =
        (session_new_versioned *)dlvsym(RTLD_NEXT, "fuse_session_new_versioned", "FUSE_3.17");
    if (real == NULL)
        return NULL;
    if (wrap(operations, size, &wrapped))
        return real(args, &wrapped, sizeof wrapped, version, userdata);
    return real(args, operations, size, version, userdata);
}
#endif

/* --- for Python ------------------------------------------------------------------------------ */

static PyObject *wrap_next_session(PyObject *module, PyObject *features)
{
    long wanted = PyLong_AsLong(features);
    if (wanted == -1 && PyErr_Occurred())
        return NULL;
    door.wanted = (int)wanted;
    door.in_use = 0;
    Py_RETURN_NONE;
}

static PyObject *features(PyObject *module, PyObject *unused)
{
    return PyLong_FromLong(door.in_use);
}

static PyObject *forgo(PyObject *module, PyObject *features)
{
    long unwanted = PyLong_AsLong(features);
    if (unwanted == -1 && PyErr_Occurred())
        return NULL;
    door.in_use &= ~(int)unwanted;
    Py_RETURN_NONE;
}

static PyObject *flags(PyObject *module, PyObject *unused)
{
    return PyLong_FromLong(door.flags);
}

static PyObject *reader(PyObject *module, PyObject *unused)
{
    return PyLong_FromUnsignedLong(door.reader);
}

/* Whether a descriptor is the only one of its file, maps included, in any process: then the kernel
 * would give it a lease for writing (fcntl(2)). That is given back at once: whoever opens the file
 * meanwhile has to wait, or gets EAGAIN with O_NONBLOCK. Hence in C, where nothing comes between. */
enum { SHARED, ALONE, WRITTEN };

static PyObject *look_at(PyObject *module, PyObject *descriptor)
{
    int found = SHARED;
    int fd = (int)PyLong_AsLong(descriptor);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    fcntl(fd, F_SETSIG, SIGURG); /* SIGIO, which says that somebody waits, would end the process */
    if (fcntl(fd, F_SETLEASE, F_WRLCK) == 0)
        found = ALONE;
    else if (errno == EAGAIN && fcntl(fd, F_SETLEASE, F_RDLCK) == -1 && errno == EAGAIN)
        found = WRITTEN; /* by ourselves: nobody else can (etcdfs/fuse/replay.py) */
    fcntl(fd, F_SETLEASE, F_UNLCK);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(found);
}

static PyMethodDef methods[] = {
    {"wrap_next_session", wrap_next_session, METH_O, "Have these features in the next session."},
    {"features", features, METH_NOARGS, "Return those of the session; 0 if it is not wrapped."},
    {"forgo", forgo, METH_O, "Do without some features; before the first request."},
    {"flags", flags, METH_NOARGS, "Return the flags of the request whose handler begins."},
    {"reader", reader, METH_NOARGS, "Return the user who made the READ whose handler begins."},
    {"look_at", look_at, METH_O, "Say who has the file of a descriptor open."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_fastpath", "See _fastpath.c.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fastpath(void)
{
    return PyModule_Create(&definition);
}

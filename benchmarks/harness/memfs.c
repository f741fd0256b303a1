/* memfs: files in memory, served by libfuse, as a yardstick: `memfs MOUNTPOINT COUNTS`.
 *
 * What does a request to a FUSE daemon cost when the daemon has nothing to do? All caches are on
 * that the kernel offers to a plain libfuse filesystem: names, missing names and attributes are
 * kept for ever, contents from open to open, and listings. What is left out of `operations` is
 * answered by libfuse with ENOSYS, once: the kernel then stops asking (flush, getxattr).
 *
 * It can do what the benchmarks do, and nothing more: nothing is ever removed, and a failed
 * allocation ends it.
 *
 * When it is mounted it prints the names of the requests that it counts. The counters are 64 bit
 * numbers in the file COUNTS, in that order: reading them costs no request.
 *
 * Concurrency: one thread, as one caller at a time is measured.
 */

#define FUSE_USE_VERSION 31
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <search.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Seconds that the kernel keeps names and attributes: nobody but the kernel changes them. */
#define FOREVER 1e9

#define REQUESTS(X)                                                                             \
    X(lookup) X(getattr) X(setattr) X(readlink) X(mkdir) X(symlink) X(create) X(open) X(read)   \
    X(write) X(release) X(opendir) X(readdir) X(releasedir)

#define NUMBERED(request) COUNT_##request,
#define NAMED(request) " " #request
enum { REQUESTS(NUMBERED) COUNTERS };
static uint64_t *counts;

/* A file, directory or link. Its inode number is its address. */
struct node {
    struct node *parent;
    char *name;
    mode_t mode;
    struct timespec changed;
    struct node **children; /* of a directory, in the order in which they were made */
    char *data;             /* of a file or link */
    size_t size, room;      /* of data in bytes, or of children */
};

static struct node root = {.name = "", .mode = S_IFDIR | 0755};
static void *by_name; /* all nodes, see tsearch(3) */

static void *checked(void *memory)
{
    if (!memory)
        abort();
    return memory;
}

static struct node *node_of(fuse_ino_t ino)
{
    return ino == FUSE_ROOT_ID ? &root : (struct node *)(uintptr_t)ino;
}

static fuse_ino_t ino_of(const struct node *node)
{
    return node == &root ? FUSE_ROOT_ID : (fuse_ino_t)(uintptr_t)node;
}

static int compare(const void *one, const void *other)
{
    const struct node *left = one, *right = other;

    if (left->parent != right->parent)
        return left->parent < right->parent ? -1 : 1;
    return strcmp(left->name, right->name);
}

static void touch(struct node *node)
{
    clock_gettime(CLOCK_REALTIME, &node->changed);
}

static void resize(struct node *node, size_t size)
{
    if (size > node->room) {
        node->room = size * 2;
        node->data = checked(realloc(node->data, node->room));
    }
    if (size > node->size)
        memset(node->data + node->size, 0, size - node->size);
    node->size = size;
    touch(node);
}

static struct node *make(fuse_ino_t parent, const char *name, mode_t mode)
{
    struct node *directory = node_of(parent), *node = checked(calloc(1, sizeof *node));

    node->parent = directory;
    node->name = checked(strdup(name));
    node->mode = mode;
    touch(node);
    checked(tsearch(node, &by_name, compare));
    if (directory->size == directory->room) {
        directory->room = directory->room ? directory->room * 2 : 16;
        directory->children =
            checked(realloc(directory->children, directory->room * sizeof node));
    }
    directory->children[directory->size++] = node;
    touch(directory);
    return node;
}

static struct stat stat_of(const struct node *node)
{
    return (struct stat){
        .st_ino = ino_of(node),
        .st_mode = node->mode,
        .st_nlink = 1,
        .st_size = S_ISDIR(node->mode) ? 0 : (off_t)node->size,
        .st_uid = getuid(),
        .st_gid = getgid(),
        .st_atim = node->changed,
        .st_mtim = node->changed,
        .st_ctim = node->changed,
    };
}

/* What the kernel is told of a name; a node of NULL is a name that is missing. */
static struct fuse_entry_param entry_of(const struct node *node)
{
    struct fuse_entry_param entry = {.attr_timeout = FOREVER, .entry_timeout = FOREVER};

    if (node) {
        entry.ino = ino_of(node);
        entry.attr = stat_of(node);
    }
    return entry;
}

static void reply_entry(fuse_req_t req, const struct node *node)
{
    struct fuse_entry_param entry = entry_of(node);

    fuse_reply_entry(req, &entry);
}

static void reply_attr(fuse_req_t req, const struct node *node)
{
    struct stat attributes = stat_of(node);

    fuse_reply_attr(req, &attributes, FOREVER);
}

/* --- requests --------------------------------------------------------------------------- */

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct node wanted = {.parent = node_of(parent), .name = (char *)name};
    struct node **found = tfind(&wanted, &by_name, compare);

    counts[COUNT_lookup]++;
    reply_entry(req, found ? *found : NULL);
}

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)fi;
    counts[COUNT_getattr]++;
    reply_attr(req, node_of(ino));
}

static void do_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *wanted, int to_set,
                       struct fuse_file_info *fi)
{
    struct node *node = node_of(ino);

    (void)fi;
    counts[COUNT_setattr]++;
    if (to_set & FUSE_SET_ATTR_SIZE)
        resize(node, (size_t)wanted->st_size);
    if (to_set & FUSE_SET_ATTR_MODE)
        node->mode = (node->mode & S_IFMT) | (wanted->st_mode & ~S_IFMT);
    reply_attr(req, node);
}

static void do_readlink(fuse_req_t req, fuse_ino_t ino)
{
    counts[COUNT_readlink]++;
    fuse_reply_readlink(req, node_of(ino)->data);
}

static void do_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    counts[COUNT_mkdir]++;
    reply_entry(req, make(parent, name, S_IFDIR | mode));
}

static void do_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
    struct node *node = make(parent, name, S_IFLNK | 0777);

    counts[COUNT_symlink]++;
    node->data = checked(strdup(target));
    node->size = strlen(target);
    reply_entry(req, node);
}

static void do_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                      struct fuse_file_info *fi)
{
    struct fuse_entry_param entry = entry_of(make(parent, name, S_IFREG | mode));

    counts[COUNT_create]++;
    fi->keep_cache = 1;
    fuse_reply_create(req, &entry, fi);
}

static void do_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    counts[COUNT_open]++;
    if (fi->flags & O_TRUNC)
        resize(node_of(ino), 0);
    fi->keep_cache = 1;
    fuse_reply_open(req, fi);
}

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                    struct fuse_file_info *fi)
{
    struct node *node = node_of(ino);
    size_t start = (size_t)offset < node->size ? (size_t)offset : node->size;
    size_t left = node->size - start;

    (void)fi;
    counts[COUNT_read]++;
    fuse_reply_buf(req, node->data + start, size < left ? size : left);
}

static void do_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *fi)
{
    struct node *node = node_of(ino);
    size_t end = (size_t)offset + size;

    (void)fi;
    counts[COUNT_write]++;
    resize(node, end > node->size ? end : node->size);
    memcpy(node->data + offset, data, size);
    fuse_reply_write(req, size);
}

static void do_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino, (void)fi;
    counts[COUNT_release]++;
    fuse_reply_err(req, 0);
}

static void do_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino;
    counts[COUNT_opendir]++;
    fi->keep_cache = 1;
    fi->cache_readdir = 1;
    fuse_reply_open(req, fi);
}

/* The offset of an entry is how many are before it and itself; `.` and `..` are left out. */
static void list(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, int plus)
{
    struct node *directory = node_of(ino);
    char *buffer = checked(malloc(size));
    size_t used = 0;

    counts[COUNT_readdir]++;
    for (size_t at = (size_t)offset; at < directory->size; at++) {
        struct fuse_entry_param entry = entry_of(directory->children[at]);
        const char *name = directory->children[at]->name;
        size_t needed =
            plus ? fuse_add_direntry_plus(req, buffer + used, size - used, name, &entry, at + 1)
                 : fuse_add_direntry(req, buffer + used, size - used, name, &entry.attr, at + 1);

        if (needed > size - used)
            break;
        used += needed;
    }
    fuse_reply_buf(req, buffer, used);
    free(buffer);
}

static void do_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                       struct fuse_file_info *fi)
{
    (void)fi;
    list(req, ino, size, offset, 0);
}

static void do_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset,
                           struct fuse_file_info *fi)
{
    (void)fi;
    list(req, ino, size, offset, 1);
}

static void do_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)ino, (void)fi;
    counts[COUNT_releasedir]++;
    fuse_reply_err(req, 0);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = do_lookup,
    .getattr = do_getattr,
    .setattr = do_setattr,
    .readlink = do_readlink,
    .mkdir = do_mkdir,
    .symlink = do_symlink,
    .create = do_create,
    .open = do_open,
    .read = do_read,
    .write = do_write,
    .release = do_release,
    .opendir = do_opendir,
    .readdir = do_readdir,
    .readdirplus = do_readdirplus,
    .releasedir = do_releasedir,
};

/* --- the program ------------------------------------------------------------------------ */

static int map_counts(const char *path)
{
    size_t size = COUNTERS * sizeof *counts;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

    if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
        return -1;
    counts = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return counts == MAP_FAILED ? -1 : 0;
}

int main(int argc, char **argv)
{
    /* The kernel checks permissions, so that access(2) is no request. */
    char *options[] = {argv[0], "-o", "default_permissions,fsname=memfs"};
    struct fuse_args args = FUSE_ARGS_INIT(3, options);
    struct fuse_session *session;
    int failed = 1;

    if (argc != 3 || map_counts(argv[2]) < 0) {
        fprintf(stderr, "usage: %s MOUNTPOINT COUNTS\n", argv[0]);
        return 2;
    }
    touch(&root);
    session = fuse_session_new(&args, &operations, sizeof operations, NULL);
    if (!session)
        return 1;
    if (fuse_set_signal_handlers(session) == 0) {
        if (fuse_session_mount(session, argv[1]) == 0) {
            puts(REQUESTS(NAMED));
            fflush(stdout);
            failed = fuse_session_loop(session) < 0;
            fuse_session_unmount(session);
        }
        fuse_remove_signal_handlers(session);
    }
    fuse_session_destroy(session);
    return failed;
}

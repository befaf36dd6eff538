/* recorder.c -- LD_PRELOAD: writes down every change of files under one folder, from Python and from the C engine alike.
 *
 * KVMPY_RECORD_ROOT is the folder, KVMPY_RECORD_LOG the file that gets the records, KVMPY_RECORD_MARKS a descriptor:
 * what is written to it is no change but a mark ("flush 7 is done") among the records. The lock is held over the call
 * and its record, so that the log's order is the order in which the changes took effect: of two changes that overlap in
 * time, the later record is the later change.
 *
 * A record: u32 length of what follows, u8 kind, u64 inode, u64 offset, u64 size, u16 length of path, path,
 * u16 length of second path, second path, data. Only calls that succeeded are recorded.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 'c', WRITE = 'w', TRUNCATE = 't', PUNCH = 'p', EXTEND = 'e', SYNC = 's', RENAME = 'r', LINK = 'l', UNLINK = 'u',
       MKDIR = 'd', RMDIR = 'x', MARK = 'm' };

/* Of a record in memory: its head, and one for each buffer of a writev. */
#define MOST_PARTS 1024

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1, marks_fd = -1;
static char root[PATH_MAX];
static size_t root_length;

__attribute__((constructor)) static void start(void)
{
    const char *folder = getenv("KVMPY_RECORD_ROOT"), *log = getenv("KVMPY_RECORD_LOG"), *marks = getenv("KVMPY_RECORD_MARKS");
    if (!folder || !log || !realpath(folder, root))
        return;
    root_length = strlen(root);
    marks_fd = marks ? atoi(marks) : -1;
    int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 1000);
    syscall(SYS_close, fd);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_inside(const char *path)
{
    return log_fd >= 0 && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* The absolute path of (dirfd, path), its folder resolved, in `out`; whether it is under the root. */
static int locate(int dirfd, const char *path, char *out)
{
    char name[PATH_MAX], folder[PATH_MAX], link[64];
    if (path[0] == '/' || dirfd == AT_FDCWD) {
        snprintf(name, sizeof name, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
        ssize_t length = readlink(link, folder, sizeof folder - 1);
        if (length < 0)
            return 0;
        folder[length] = 0;
        snprintf(name, sizeof name, "%.2000s/%.2000s", folder, path);
    }
    size_t end = strlen(name);
    while (end > 1 && name[end - 1] == '/')
        name[--end] = 0;
    char *slash = strrchr(name, '/');
    const char *last = slash ? slash + 1 : name;
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - name) + (slash == name) : 1, slash ? name : ".");
    if (!realpath(parent, folder))
        return 0;
    snprintf(out, PATH_MAX, "%.2000s/%.2000s", strcmp(folder, "/") ? folder : "", last);
    return is_inside(out);
}

static int locate_fd(int fd, char *out, uint64_t *inode)
{
    char link[64];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = log_fd < 0 ? -1 : readlink(link, out, PATH_MAX - 1);
    if (length < 0 || fstat(fd, &status) < 0)
        return 0;
    out[length] = 0;
    *inode = status.st_ino;
    return is_inside(out);
}

static uint64_t inode_of(const char *path)
{
    struct stat status;
    return lstat(path, &status) < 0 ? 0 : status.st_ino;
}

static const char *inner(const char *path)
{
    return path[root_length] ? path + root_length + 1 : path + root_length;
}

static void record(char kind, uint64_t inode, uint64_t offset, uint64_t size, const char *path, const char *second,
                   const struct iovec *data, int count)
{
    uint16_t lengths[2] = {path ? strlen(path) : 0, second ? strlen(second) : 0};
    uint64_t numbers[3] = {inode, offset, size};
    uint32_t total = 1 + sizeof numbers + 4 + lengths[0] + lengths[1], left = kind == WRITE || kind == MARK ? size : 0;
    struct iovec parts[MOST_PARTS] = {{&total, 4}, {&kind, 1}, {numbers, sizeof numbers}, {&lengths[0], 2},
                              {(void *)path, lengths[0]}, {&lengths[1], 2}, {(void *)second, lengths[1]}};
    total += left;
    int n = 7;
    for (int i = 0; i < count && left && n < MOST_PARTS; i++) {
        parts[n].iov_base = data[i].iov_base;
        parts[n].iov_len = data[i].iov_len < left ? data[i].iov_len : left;
        left -= parts[n++].iov_len;
    }
    if (left || syscall(SYS_writev, log_fd, parts, n) != (ssize_t)total + 4)
        abort();
}

/* --- opening ---------------------------------------------------------------------------------------------------- */

static int open_at(int dirfd, const char *path, int flags, mode_t mode)
{
    char place[PATH_MAX];
    if (log_fd < 0 || !(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE || !locate(dirfd, path, place))
        return syscall(SYS_openat, dirfd, path, flags, mode);
    pthread_mutex_lock(&lock);
    uint64_t before = inode_of(place);
    int fd = syscall(SYS_openat, dirfd, path, flags, mode);
    int error = errno;
    if (fd >= 0 && !before)
        record(CREATE, inode_of(place), 0, 0, inner(place), NULL, NULL, 0);
    else if (fd >= 0 && flags & O_TRUNC)
        record(TRUNCATE, before, 0, 0, inner(place), NULL, NULL, 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE_ARGUMENT                                                                                                  \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list arguments;                                                                                             \
        va_start(arguments, flags);                                                                                    \
        mode = va_arg(arguments, mode_t);                                                                              \
        va_end(arguments);                                                                                             \
    }

int open(const char *path, int flags, ...) { MODE_ARGUMENT return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_ARGUMENT return open_at(AT_FDCWD, path, flags, mode); }
int openat(int dirfd, const char *path, int flags, ...) { MODE_ARGUMENT return open_at(dirfd, path, flags, mode); }
int openat64(int dirfd, const char *path, int flags, ...) { MODE_ARGUMENT return open_at(dirfd, path, flags, mode); }

/* --- changes of a file ------------------------------------------------------------------------------------------- */

/* Make one call on `fd`, and a record of it when it succeeded on a file of ours. */
#define ON_FILE(type, call, kind, at, length, data, count)                                                             \
    char place[PATH_MAX];                                                                                              \
    uint64_t inode;                                                                                                    \
    if (!locate_fd(fd, place, &inode))                                                                                 \
        return call;                                                                                                   \
    pthread_mutex_lock(&lock);                                                                                         \
    type result = call;                                                                                                \
    int error = errno;                                                                                                 \
    if (result >= 0)                                                                                                   \
        record(kind, inode, at, length, inner(place), NULL, data, count);                                              \
    pthread_mutex_unlock(&lock);                                                                                       \
    errno = error;                                                                                                     \
    return result;

ssize_t pwritev(int fd, const struct iovec *data, int count, off_t offset)
{
    ON_FILE(ssize_t, REAL(pwritev)(fd, data, count, offset), WRITE, offset, result, data, count)
}

ssize_t pwritev64(int fd, const struct iovec *data, int count, off_t offset) { return pwritev(fd, data, count, offset); }

ssize_t pwritev2(int fd, const struct iovec *data, int count, off_t offset, int flags)
{
    ON_FILE(ssize_t, REAL(pwritev2)(fd, data, count, offset, flags), WRITE, offset, result, data, count)
}

ssize_t pwritev64v2(int fd, const struct iovec *data, int count, off_t offset, int flags)
{
    return pwritev2(fd, data, count, offset, flags);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    struct iovec one = {(void *)data, size};
    return pwritev(fd, &one, 1, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return pwrite(fd, data, size, offset); }

ssize_t write(int fd, const void *data, size_t size)
{
    struct iovec one = {(void *)data, size};
    if (fd == marks_fd && log_fd >= 0) {
        pthread_mutex_lock(&lock);
        record(MARK, 0, 0, size, NULL, NULL, &one, 1);
        pthread_mutex_unlock(&lock);
        return size;
    }
    off_t at = log_fd >= 0 ? lseek(fd, 0, SEEK_CUR) : 0;
    ON_FILE(ssize_t, syscall(SYS_write, fd, data, size), WRITE, at, result, &one, 1)
}

int ftruncate(int fd, off_t size) { ON_FILE(int, syscall(SYS_ftruncate, fd, size), TRUNCATE, 0, size, NULL, 0) }
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

/* With a hole or zeros asked for, the range reads as zeros and the size stays; else no byte changes, but the size may. */
int fallocate(int fd, int mode, off_t offset, off_t size)
{
    if (mode == FALLOC_FL_KEEP_SIZE)
        return syscall(SYS_fallocate, fd, mode, offset, size);
    ON_FILE(int, syscall(SYS_fallocate, fd, mode, offset, size), mode ? PUNCH : EXTEND, offset, size, NULL, 0)
}

int fallocate64(int fd, int mode, off_t offset, off_t size) { return fallocate(fd, mode, offset, size); }
int fsync(int fd) { ON_FILE(int, syscall(SYS_fsync, fd), SYNC, 0, 0, NULL, 0) }
int fdatasync(int fd) { ON_FILE(int, syscall(SYS_fdatasync, fd), SYNC, 0, 0, NULL, 0) }

/* --- changes of a folder ----------------------------------------------------------------------------------------- */

#define ON_NAMES(call, kind, inode, first, second)                                                                     \
    pthread_mutex_lock(&lock);                                                                                         \
    uint64_t number = inode;                                                                                           \
    int result = call;                                                                                                 \
    int error = errno;                                                                                                 \
    if (!result)                                                                                                       \
        record(kind, number ? number : inode, 0, 0, first, second, NULL, 0);                                           \
    pthread_mutex_unlock(&lock);                                                                                       \
    errno = error;                                                                                                     \
    return result;

static int rename_at(int from_fd, const char *from, int to_fd, const char *to, unsigned flags)
{
    char old[PATH_MAX], new[PATH_MAX];
    if (log_fd < 0 || !locate(from_fd, from, old) || !locate(to_fd, to, new))
        return syscall(SYS_renameat2, from_fd, from, to_fd, to, flags);
    ON_NAMES(syscall(SYS_renameat2, from_fd, from, to_fd, to, flags), RENAME, inode_of(old), inner(old), inner(new))
}

int rename(const char *from, const char *to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return rename_at(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return rename_at(a, from, b, to, flags); }

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags)
{
    char old[PATH_MAX], new[PATH_MAX];
    if (log_fd < 0 || !locate(to_fd, to, new) || !locate(from_fd, from, old))
        return syscall(SYS_linkat, from_fd, from, to_fd, to, flags);
    ON_NAMES(syscall(SYS_linkat, from_fd, from, to_fd, to, flags), LINK, inode_of(old), inner(old), inner(new))
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int dirfd, const char *path, int flags)
{
    char place[PATH_MAX];
    if (log_fd < 0 || !locate(dirfd, path, place))
        return syscall(SYS_unlinkat, dirfd, path, flags);
    ON_NAMES(syscall(SYS_unlinkat, dirfd, path, flags), flags & AT_REMOVEDIR ? RMDIR : UNLINK, inode_of(place), inner(place), NULL)
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dirfd, const char *path, mode_t mode)
{
    char place[PATH_MAX];
    if (log_fd < 0 || !locate(dirfd, path, place))
        return syscall(SYS_mkdirat, dirfd, path, mode);
    ON_NAMES(syscall(SYS_mkdirat, dirfd, path, mode), MKDIR, inode_of(place), inner(place), NULL)
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

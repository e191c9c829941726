// Loaded before the C library (LD_PRELOAD): sees each call of a process that changes a file below a folder or sends
// something to a Hub, tells it to a log, and lets one of them go wrong. A call that only reads is none of its business.
//
// worker.py calls `arm`. Each line of the log is: number, kind, whether it was done (1) or failed (0), inode, offset,
// bytes, path, second path, separated by tabs; then that many bytes, as they were written.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, WATCH, KILL, FAIL, FAIL_ON, SHORT, STOP };

static int mode, code, log_file;
static long at, count;
static char root[PATH_MAX];
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static const char *failing;
static char asks[1 << 16];

// From now on: what goes wrong, at which call, with which error. `kinds`: for FAIL_ON, those that fail from there on.
void arm(const char *folder, int log, int how, long number, int error, const char *kinds) {
    snprintf(root, sizeof root, "%s/", folder);
    log_file = log, at = number, code = error, count = 0, failing = kinds, mode = how;
}

typedef struct {
    const char *kind;
    char path[PATH_MAX], other[PATH_MAX];
    unsigned long inode;
    long offset;
    const void *data;
    size_t size;
    int is_ours, is_locked;
    long number;
} Call;

static int below(const char *path) {
    size_t size = strlen(root) - 1;
    return strncmp(path, root, size) == 0 && (path[size] == '/' || !path[size]);
}

static void name_of(int file, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[size < 0 ? 0 : size] = 0;
}

static void locate(int folder, const char *path, char *out) {
    char start[PATH_MAX] = "";
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (folder == AT_FDCWD)
        syscall(SYS_getcwd, start, sizeof start);
    else
        name_of(folder, start);
    if (snprintf(out, PATH_MAX, "%s/%s", start, path) >= PATH_MAX) out[0] = 0;
}

// Whether the call is to fail. The caller does it, and then calls `after`.
static int before(Call *call, const char *kind) {
    call->kind = kind;
    call->is_ours = mode != OFF && (below(call->path) || strcmp(kind, "send") == 0);
    if (!call->is_ours) return 0;
    if (strcmp(kind, "send") != 0) call->is_locked = pthread_mutex_lock(&turn) == 0;
    call->number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    if (mode == FAIL_ON) return call->number >= at && strstr(failing, kind) != NULL;
    if (call->number != at) return 0;
    if (mode == KILL) syscall(SYS_kill, getpid(), SIGKILL);
    if (mode == STOP) syscall(SYS_kill, getpid(), SIGSTOP);
    return mode == FAIL;
}

static long after(Call *call, long result) {
    int error = errno;
    if (call->is_ours) {
        char line[2 * PATH_MAX + 200];
        size_t size = result > 0 && call->data ? (size_t)result : 0;
        int length = snprintf(line, sizeof line, "%ld\t%s\t%d\t%lu\t%ld\t%zu\t%s\t%s\n", call->number, call->kind,
                              result >= 0, call->inode, call->offset, size, call->path, call->other);
        struct iovec parts[2] = {{line, (size_t)length}, {(void *)(size_t)call->data, size}};
        syscall(SYS_writev, log_file, parts, 2);
    }
    if (call->is_locked) pthread_mutex_unlock(&turn);
    errno = error;
    return result;
}

static long refuse(Call *call) {
    errno = code;
    return after(call, -1);
}

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

#define REAL(type, name, ...)                     \
    static type (*next)(__VA_ARGS__);             \
    if (!next) *(void **)(&next) = real(name)

static void by_file(Call *call, int file) {
    struct stat status;
    name_of(file, call->path);
    if (fstat(file, &status) == 0) call->inode = status.st_ino;
}

// --- opening

static int open_any(int folder, const char *path, int flags, int permissions) {
    REAL(int, "openat64", int, const char *, int, ...);
    if (mode == OFF || (flags & O_ACCMODE) == O_RDONLY) return next(folder, path, flags, permissions);
    Call call = {0};
    locate(folder, path, call.path);
    if (before(&call, flags & O_CREAT ? "create" : "open")) return (int)refuse(&call);
    int file = next(folder, path, flags, permissions);
    struct stat status;
    if (file >= 0 && fstat(file, &status) == 0) call.inode = status.st_ino;
    return (int)after(&call, file);
}

#define PERMISSIONS                                   \
    va_list rest;                                     \
    va_start(rest, flags);                            \
    int permissions = flags & O_CREAT ? va_arg(rest, int) : 0; \
    va_end(rest)

int open(const char *path, int flags, ...) {
    PERMISSIONS;
    return open_any(AT_FDCWD, path, flags, permissions);
}

int open64(const char *path, int flags, ...) {
    PERMISSIONS;
    return open_any(AT_FDCWD, path, flags, permissions);
}

int openat(int folder, const char *path, int flags, ...) {
    PERMISSIONS;
    return open_any(folder, path, flags, permissions);
}

int openat64(int folder, const char *path, int flags, ...) {
    PERMISSIONS;
    return open_any(folder, path, flags, permissions);
}

// --- writing

static long half(size_t size) { return (long)(mode == SHORT && size > 1 ? size / 2 : size); }

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (mode == OFF) return next(file, data, size);
    Call call = {.data = data};
    by_file(&call, file);
    struct stat status;
    int at_end = fcntl(file, F_GETFL) & O_APPEND && fstat(file, &status) == 0;
    call.offset = at_end ? status.st_size : lseek(file, 0, SEEK_CUR);
    if (before(&call, "write")) return refuse(&call);
    return after(&call, next(file, data, (size_t)(call.is_ours && call.number == at ? half(size) : (long)size)));
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (mode == OFF) return next(file, data, size, offset);
    Call call = {.data = data, .offset = offset};
    by_file(&call, file);
    if (before(&call, "write")) return refuse(&call);
    size_t most = (size_t)(call.is_ours && call.number == at ? half(size) : (long)size);
    return after(&call, next(file, data, most, offset));
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) { return pwrite64(file, data, size, offset); }

// --- calls on an open file

#define ON_FILE(name, kind, extra, ...)                       \
    REAL(int, name, __VA_ARGS__);                             \
    Call call = {.offset = (long)(extra)};                    \
    if (mode != OFF) by_file(&call, file);                    \
    if (before(&call, kind)) return (int)refuse(&call)

int fsync(int file) {
    ON_FILE("fsync", "fsync", 0, int);
    return (int)after(&call, next(file));
}

int fdatasync(int file) {
    ON_FILE("fdatasync", "fsync", 0, int);
    return (int)after(&call, next(file));
}

int ftruncate64(int file, off64_t size) {
    ON_FILE("ftruncate64", "truncate", size, int, off64_t);
    return (int)after(&call, next(file, size));
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int fchmod(int file, mode_t permissions) {
    ON_FILE("fchmod", "chmod", permissions, int, mode_t);
    return (int)after(&call, next(file, permissions));
}

int flock(int file, int how) {
    ON_FILE("flock", "flock", how, int, int);
    return (int)after(&call, next(file, how));
}

// --- names

#define ON_NAME(folder, kind)                                 \
    Call call = {0};                                          \
    if (mode != OFF) locate(folder, path, call.path);         \
    if (before(&call, kind)) return (int)refuse(&call)

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    ON_NAME(folder, flags & AT_REMOVEDIR ? "rmdir" : "unlink");
    return (int)after(&call, next(folder, path, flags));
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t permissions) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    ON_NAME(folder, "mkdir");
    return (int)after(&call, next(folder, path, permissions));
}

int mkdir(const char *path, mode_t permissions) { return mkdirat(AT_FDCWD, path, permissions); }

int fchmodat(int folder, const char *path, mode_t permissions, int flags) {
    REAL(int, "fchmodat", int, const char *, mode_t, int);
    ON_NAME(folder, "chmod");
    return (int)after(&call, next(folder, path, permissions, flags));
}

int chmod(const char *path, mode_t permissions) { return fchmodat(AT_FDCWD, path, permissions, 0); }

int renameat2(int from, const char *path, int to, const char *new, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    Call call = {0};
    if (mode != OFF) locate(from, path, call.path), locate(to, new, call.other);
    if (before(&call, "rename")) return (int)refuse(&call);
    return (int)after(&call, next(from, path, to, new, flags));
}

int renameat(int from, const char *path, int to, const char *new) { return renameat2(from, path, to, new, 0); }
int rename(const char *path, const char *new) { return renameat2(AT_FDCWD, path, AT_FDCWD, new, 0); }

int linkat(int from, const char *path, int to, const char *new, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    Call call = {0};
    if (mode != OFF) locate(from, path, call.path), locate(to, new, call.other);
    if (before(&call, "link")) return (int)refuse(&call);
    return (int)after(&call, next(from, path, to, new, flags));
}

int link(const char *path, const char *new) { return linkat(AT_FDCWD, path, AT_FDCWD, new, 0); }

// --- requests. A request that only asks for something changes nothing, however many pieces it is sent in.

ssize_t send(int file, const void *data, size_t size, int flags) {
    REAL(ssize_t, "send", int, const void *, size_t, int);
    if (mode == OFF || file >= (int)sizeof asks) return next(file, data, size, flags);
    const char *text = data;
    if (size > 5 && (!strncmp(text, "GET ", 4) || !strncmp(text, "HEAD ", 5))) asks[file] = 1;
    int is_request = size > 5 && (!strncmp(text, "POST ", 5) || !strncmp(text, "PUT ", 4));
    if (is_request) asks[file] = 0;
    struct sockaddr_storage peer;
    socklen_t length = sizeof peer;
    int is_network = getpeername(file, (struct sockaddr *)&peer, &length) == 0 && peer.ss_family != AF_UNIX;
    if (asks[file] || !is_network) return next(file, data, size, flags);
    Call call = {0};
    for (size_t i = 0; is_request && i < size && i < sizeof call.path - 1 && !strchr("?\r\n", text[i]); i++)
        call.path[i] = text[i];
    if (before(&call, "send")) {
        if (code != EINTR) shutdown(file, SHUT_RDWR);  // The connection is gone, for whoever waits for an answer, too.
        return refuse(&call);
    }
    return after(&call, next(file, data, size, flags));
}

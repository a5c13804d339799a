/* A disk that fails: loaded before the C library, it counts what is done to files under one folder.
 *
 * failing_disk_arm(folder, number, mode) starts to count. With mode 0 the disk is full from the operation
 * `number` on: what needs room fails with ENOSPC, the rest goes on. With mode 1 only that operation fails,
 * whatever it is, with EIO. Number 0 fails nothing. failing_disk_count() tells how many there were.
 *
 *     cc -shared -fPIC -o failing_disk.so failing_disk.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char under[PATH_MAX];
static long fail_at, count;
static int mode;

void failing_disk_arm(const char *folder, long number, int new_mode) {
    strncpy(under, folder, sizeof under - 1);
    fail_at = number;
    mode = new_mode;
    count = 0;
}

long failing_disk_count(void) { return count; }

static int fails_at_path(const char *path, int needs_room) {
    if (!under[0] || !path || strncmp(path, under, strlen(under)) != 0) return 0;
    if (mode == 0 && !needs_room) return 0;
    long number = __sync_add_and_fetch(&count, 1);
    if (!fail_at || (mode == 0 ? number < fail_at : number != fail_at)) return 0;
    errno = mode == 0 ? ENOSPC : EIO;
    return 1;
}

static int fails_at(int descriptor, int needs_room) {
    char link[64], path[PATH_MAX];
    if (!under[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails_at_path(path, needs_room);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *from, size_t size) {
    return fails_at(fd, 1) ? -1 : NEXT(write)(fd, from, size);
}
ssize_t pwrite(int fd, const void *from, size_t size, off_t place) {
    return fails_at(fd, 1) ? -1 : NEXT(pwrite)(fd, from, size, place);
}
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t place) {
    return fails_at(fd, 1) ? -1 : NEXT(pwrite64)(fd, from, size, place);
}
int ftruncate(int fd, off_t size) { return fails_at(fd, size > 0) ? -1 : NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fails_at(fd, size > 0) ? -1 : NEXT(ftruncate64)(fd, size); }
int posix_fallocate(int fd, off_t place, off_t size) {
    return fails_at(fd, 1) ? errno : NEXT(posix_fallocate)(fd, place, size);
}
int fsync(int fd) { return fails_at(fd, 0) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return fails_at(fd, 0) ? -1 : NEXT(fdatasync)(fd); }
int mkdir(const char *path, mode_t bits) { return fails_at_path(path, 1) ? -1 : NEXT(mkdir)(path, bits); }
int rename(const char *from, const char *to) { return fails_at_path(to, 1) ? -1 : NEXT(rename)(from, to); }
int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    return fails_at_path(to, 1) ? -1 : NEXT(renameat2)(from_fd, from, to_fd, to, flags);
}
int unlink(const char *path) { return fails_at_path(path, 0) ? -1 : NEXT(unlink)(path); }

#define OPENS(name)                                                                    \
    int name(const char *path, int flags, ...) {                                       \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t bits = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                      \
        va_end(rest);                                                                  \
        if (flags & O_CREAT && access(path, F_OK) && fails_at_path(path, 1)) return -1; \
        return NEXT(name)(path, flags, bits);                                          \
    }
OPENS(open)
OPENS(open64)

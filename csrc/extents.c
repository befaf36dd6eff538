/* extents.c -- where the bytes of a disk are: see block.h. */
#include "kvmpy.h"

#include <unistd.h>

void kvmpy_disk_init(struct kvmpy_disk *disk)
{
    /* Busy queues always have some reader: a writer that did not go first might wait for ever. */
    disk->lock = (pthread_rwlock_t)PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
    disk->syncing = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

void kvmpy_disk_lock(struct kvmpy_disk *disk)
{
    pthread_rwlock_wrlock(&disk->lock);
}

void kvmpy_disk_unlock(struct kvmpy_disk *disk)
{
    pthread_rwlock_unlock(&disk->lock);
}

uint64_t kvmpy_disk_find(const struct kvmpy_disk *disk, uint64_t sector)
{
    /* Bisection without a branch that a processor could guess wrongly: a random guest would make it, at each step. */
    const struct kvmpy_extent *first = disk->extents;
    uint64_t left = disk->nr_extents;
    while (left > 1) {
        uint64_t half = left / 2;
        const struct kvmpy_extent *middle = first + half, *before = middle - 1;
        first = before->sector + before->sectors <= sector ? middle : first;
        left -= half;
    }
    return first - disk->extents + (left && first->sector + first->sectors <= sector);
}

uint64_t kvmpy_disk_missing(const struct kvmpy_disk *disk, uint64_t sector, uint64_t sectors, bool writable,
                            uint64_t *begin)
{
    uint64_t end = sector + sectors;
    for (uint64_t i = kvmpy_disk_find(disk, sector); sector < end && i < disk->nr_extents; i++) {
        const struct kvmpy_extent *extent = &disk->extents[i];
        if (extent->sector >= end)
            break;
        if (writable && !extent->writable)
            continue;
        if (extent->sector > sector)
            end = extent->sector;
        else
            sector = extent->sector + extent->sectors;
    }
    *begin = sector;
    return sector < end ? end - sector : 0;
}

int kvmpy_disk_sync(struct kvmpy_disk *disk)
{
    /* One at a time: the kernel tells an error to one caller only, and the others shall know of it too. */
    pthread_mutex_lock(&disk->syncing);
    for (uint64_t i = 0; i < disk->nr_files && !disk->sync_failed; i++) {
        int result = 0;
        while (disk->files[i].was_writable && (result = fdatasync(disk->files[i].fd)) < 0 && errno == EINTR)
            ;
        disk->sync_failed = result < 0;
    }
    int status = disk->sync_failed ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK;
    pthread_mutex_unlock(&disk->syncing);
    return status;
}

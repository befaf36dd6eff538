/* block_request.c -- what a request means, and what it does to a disk: see block.h. */
#include "kvmpy.h"

#include <fcntl.h>
#include <unistd.h>

#define MOST_AT_ONCE (16u << 20 >> 9) /* sectors: between two looks at `stopped` */

static bool is_on_disk(const struct kvmpy_disk *disk, uint64_t sector, uint64_t sectors)
{
    return sector <= disk->capacity && sectors <= disk->capacity - sector;
}

/* --- the front of the data: what is there to be moved next --- */

enum what { DROP, TAKE, GIVE, CLEAR };

/* Cut `size` bytes off the front of the data; TAKE them into the buffer, GIVE them the buffer's, or CLEAR them. */
static void cut(struct kvmpy_request *request, uint64_t size, enum what what, void *buffer)
{
    for (size_t part; size; size -= part) {
        struct iovec *front = request->data;
        part = front->iov_len < size ? front->iov_len : size;
        if (what == TAKE)
            kvmpy_copy_once(buffer, front->iov_base, part);
        else if (what == GIVE)
            memcpy(front->iov_base, buffer, part);
        else if (what == CLEAR)
            memset(front->iov_base, 0, part);
        buffer = buffer ? (uint8_t *)buffer + part : NULL;
        front->iov_base = (uint8_t *)front->iov_base + part;
        front->iov_len -= part;
        request->data += !front->iov_len;
    }
}

/* --- parse --- */

/* DISCARD and WRITE_ZEROES. */
static int parse_ranges(struct kvmpy_block_queue *queue, uint64_t data_out, uint64_t data_in)
{
    struct kvmpy_request *request = &queue->request;
    bool is_discard = request->type == VIRTIO_BLK_T_DISCARD;
    if (!kvmpy_has(&queue->ring, is_discard ? VIRTIO_BLK_F_DISCARD : VIRTIO_BLK_F_WRITE_ZEROES))
        return VIRTIO_BLK_S_UNSUPP;
    uint64_t size = sizeof request->ranges[0];
    if (queue->disk->readonly || data_in || !data_out || data_out % size || data_out / size > KVMPY_MAX_RANGES)
        return VIRTIO_BLK_S_IOERR;
    cut(request, data_out, TAKE, request->ranges);
    request->nr_ranges = data_out / size;
    uint32_t allowed = is_discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    for (uint32_t i = 0; i < request->nr_ranges; i++) {
        const struct virtio_blk_discard_write_zeroes *range = &request->ranges[i];
        if (range->flags & ~allowed)
            return VIRTIO_BLK_S_UNSUPP;
        if (range->num_sectors > KVMPY_MAX_RANGE_SECTORS || !is_on_disk(queue->disk, range->sector, range->num_sectors))
            return VIRTIO_BLK_S_IOERR;
    }
    return KVMPY_EXECUTE;
}

/* IN and OUT: `bytes` of data, and `others` in the wrong direction. */
static int parse_transfer(struct kvmpy_block_queue *queue, uint64_t bytes, uint64_t others)
{
    queue->request.bytes = bytes;
    bool is_whole = !others && bytes % KVMPY_SECTOR_SIZE == 0;
    bool is_right = is_whole && is_on_disk(queue->disk, queue->request.sector, bytes / KVMPY_SECTOR_SIZE);
    return is_right ? KVMPY_EXECUTE : VIRTIO_BLK_S_IOERR;
}

int kvmpy_request_parse(struct kvmpy_block_queue *queue)
{
    struct kvmpy_request *request = &queue->request;
    struct kvmpy_chain *chain = &queue->chain;
    *request = (struct kvmpy_request){.data = chain->segments, .type = UINT32_MAX};
    if (!chain->writable)
        return VIRTIO_BLK_S_OK; /* and no place to say so */
    struct iovec *last = &chain->segments[chain->nr_segments - 1];
    request->status = (uint8_t *)last->iov_base + --last->iov_len;
    struct virtio_blk_outhdr header;
    if (chain->readable < sizeof header)
        return VIRTIO_BLK_S_IOERR;
    cut(request, sizeof header, TAKE, &header);
    request->type = header.type;
    request->sector = header.sector;
    uint64_t data_out = chain->readable - sizeof header, data_in = chain->writable - 1;
    switch (header.type) {
    case VIRTIO_BLK_T_IN:
        request->data = &chain->segments[chain->nr_readable];
        return parse_transfer(queue, data_in, data_out);
    case VIRTIO_BLK_T_OUT:
        return queue->disk->readonly ? VIRTIO_BLK_S_IOERR : parse_transfer(queue, data_out, data_in);
    case VIRTIO_BLK_T_FLUSH:
        if (!kvmpy_has(&queue->ring, VIRTIO_BLK_F_FLUSH))
            return VIRTIO_BLK_S_UNSUPP;
        return header.sector ? VIRTIO_BLK_S_IOERR : KVMPY_EXECUTE;
    case VIRTIO_BLK_T_GET_ID:
        request->data = &chain->segments[chain->nr_readable];
        request->bytes = data_in < VIRTIO_BLK_ID_BYTES ? data_in : VIRTIO_BLK_ID_BYTES;
        return data_out ? VIRTIO_BLK_S_IOERR : KVMPY_EXECUTE;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        return parse_ranges(queue, data_out, data_in);
    default:
        return VIRTIO_BLK_S_UNSUPP;
    }
}

/* --- execute --- */

static int ask(struct kvmpy_block_queue *queue, uint32_t operation, uint64_t sector, uint64_t sectors)
{
    queue->exit = (struct kvmpy_disk_exit){sector, sectors, operation, KVMPY_DISK_ASKED};
    return KVMPY_ASK;
}

static int make_durable(struct kvmpy_disk *disk)
{
    bool may_wait = __atomic_load_n(&disk->writeback, __ATOMIC_RELAXED);
    return may_wait ? VIRTIO_BLK_S_OK : kvmpy_disk_sync(disk);
}

/* Move `size` bytes between the front of the data and a file, or clear them: 0, or -1. */
static int move(struct kvmpy_block_queue *queue, const struct kvmpy_file *file, uint64_t offset, uint64_t size)
{
    struct kvmpy_request *request = &queue->request;
    if (!file) {
        cut(request, size, CLEAR, NULL);
        return 0;
    }
    while (size) {
        struct iovec *segments = request->data;
        uint64_t gathered = 0, unaligned = offset;
        int count = 0;
        while (gathered < size) {
            uint64_t length = segments[count].iov_len;
            if (gathered + length > size)
                length = size - gathered;
            unaligned |= (uintptr_t)segments[count].iov_base | length;
            gathered += segments[count++].iov_len;
        }
        segments[count - 1].iov_len -= gathered - size; /* for this system call */
        int fd = unaligned & (queue->disk->alignment - 1) ? file->unaligned_fd : file->fd;
        ssize_t done = request->type == VIRTIO_BLK_T_OUT ? pwritev(fd, segments, count, offset)
                                                         : preadv(fd, segments, count, offset);
        segments[count - 1].iov_len += gathered - size;
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return -1; /* an error, or the file ends here */
        cut(request, done, DROP, NULL);
        offset += done;
        size -= done;
    }
    return 0;
}

static int write_zeros(int fd, uint64_t offset, uint64_t size)
{
    static const uint8_t zeros[1 << 16];
    while (size) {
        ssize_t done = pwrite(fd, zeros, size < sizeof zeros ? size : sizeof zeros, offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return -1;
        offset += done;
        size -= done;
    }
    return 0;
}

static int zero(struct kvmpy_block_queue *queue, const struct kvmpy_file *file, uint64_t offset, uint64_t size)
{
    const struct kvmpy_request *request = &queue->request;
    uint32_t flags = request->ranges[request->range].flags;
    bool keeps_room = request->type == VIRTIO_BLK_T_WRITE_ZEROES && !(flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
    int mode = (keeps_room ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE) | FALLOC_FL_KEEP_SIZE;
    int result;
    while ((result = fallocate(file->fd, mode, offset, size)) < 0 && errno == EINTR)
        ;
    return result < 0 && errno == EOPNOTSUPP ? write_zeros(file->unaligned_fd, offset, size) : result;
}

/* Call `act` for each part of the range, which is covered, with its file (NULL: zeros) and the place there: a status. */
static int for_each_extent(struct kvmpy_block_queue *queue, uint64_t sector, uint64_t sectors,
                           int (*act)(struct kvmpy_block_queue *, const struct kvmpy_file *, uint64_t, uint64_t))
{
    const struct kvmpy_disk *disk = queue->disk;
    const struct kvmpy_extent *extent = &disk->extents[kvmpy_disk_find(disk, sector)];
    while (sectors) {
        extent += sector >= extent->sector + extent->sectors;
        uint64_t skipped = sector - extent->sector;
        uint64_t part = extent->sectors - skipped < sectors ? extent->sectors - skipped : sectors;
        part = part < MOST_AT_ONCE ? part : MOST_AT_ONCE;
        if (__atomic_load_n(&queue->stopped, __ATOMIC_ACQUIRE))
            return VIRTIO_BLK_S_IOERR; /* whoever resets the device shall not wait for gigabytes */
        const struct kvmpy_file *file = extent->file == KVMPY_ZEROS ? NULL : &disk->files[extent->file];
        if (act(queue, file, extent->offset + skipped * KVMPY_SECTOR_SIZE, part * KVMPY_SECTOR_SIZE))
            return VIRTIO_BLK_S_IOERR;
        sector += part;
        sectors -= part;
    }
    return VIRTIO_BLK_S_OK;
}

static int execute_transfer(struct kvmpy_block_queue *queue)
{
    struct kvmpy_disk *disk = queue->disk;
    uint64_t sector = queue->request.sector, sectors = queue->request.bytes / KVMPY_SECTOR_SIZE, begin;
    bool is_out = queue->request.type == VIRTIO_BLK_T_OUT;
    if (!is_on_disk(disk, sector, sectors)) /* it may have shrunk since the request was parsed */
        return VIRTIO_BLK_S_IOERR;
    uint64_t missing = kvmpy_disk_missing(disk, sector, sectors, is_out, &begin);
    missing = missing < MOST_AT_ONCE ? missing : MOST_AT_ONCE;
    if (missing)
        return ask(queue, is_out ? KVMPY_DISK_MAP_WRITE : KVMPY_DISK_MAP_READ, begin, missing);
    int status = for_each_extent(queue, sector, sectors, move);
    return is_out && status == VIRTIO_BLK_S_OK ? make_durable(disk) : status;
}

static int execute_ranges(struct kvmpy_block_queue *queue)
{
    struct kvmpy_request *request = &queue->request;
    for (; request->range < request->nr_ranges; request->range++) {
        uint64_t sector = request->ranges[request->range].sector, begin;
        uint32_t sectors = request->ranges[request->range].num_sectors;
        if (!is_on_disk(queue->disk, sector, sectors))
            return VIRTIO_BLK_S_IOERR;
        if (kvmpy_disk_missing(queue->disk, sector, sectors, true, &begin))
            return ask(queue, KVMPY_DISK_ZERO, sector, sectors);
        if (for_each_extent(queue, sector, sectors, zero) != VIRTIO_BLK_S_OK)
            return VIRTIO_BLK_S_IOERR;
    }
    return make_durable(queue->disk);
}

int kvmpy_request_execute(struct kvmpy_block_queue *queue)
{
    switch (queue->request.type) {
    case VIRTIO_BLK_T_FLUSH:
        return kvmpy_disk_sync(queue->disk);
    case VIRTIO_BLK_T_GET_ID:
        cut(&queue->request, queue->request.bytes, GIVE, queue->disk->serial);
        return VIRTIO_BLK_S_OK;
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        return execute_transfer(queue);
    default:
        return execute_ranges(queue);
    }
}

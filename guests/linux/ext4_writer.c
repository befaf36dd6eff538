/* ext4_writer.c -- what a file system promised before the power went: write synced files for ever, or verify them.
 *
 *     ext4_writer [write] [FOLDER]         from the first number that holds no whole file, until the disk is full
 *     ext4_writer verify [LAST] [FOLDER]   files 1 to LAST; without LAST, up to the first that is missing
 *
 * FOLDER is /mnt. As process 1 the program first mounts /dev/vda there, and unmounts it after verify. The arguments
 * are then the words behind `--` on the kernel's command line.
 *
 * A file is named file.NNNNNN and holds a header (below) and bytes that follow from its number; its CRC is CRC-32 as
 * in zlib. It is promised when the line `synced` has been printed: the file was fsynced, and then the folder. Between
 * two promises a file that nobody fsyncs is written and renamed, so that a cut finds the journal at work.
 *
 * Prints:  synced N CRC            write: file N will be there whatever happens
 *          full N                  write: no room for file N; the program waits for its end
 *          whole N CRC             verify
 *          torn N                  verify: there, but not what was written
 *          missing N               verify
 *          verified W of L         verify: how many are whole
 */
#include "user.h"

#define LARGEST 16384u

struct header {
    char magic[8];
    uint32_t number, length, crc, zero;
};

static const char magic[8] = "kvmpy-1\n";
static struct {
    struct header header;
    uint8_t content[LARGEST];
} wanted, found;
static char folder[200] = "/mnt", path[256], other_path[256];
static uint32_t crc_table[256];

static void make_crc_table(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
        crc_table[byte] = value;
    }
}

static uint32_t crc_of(const uint8_t *bytes, uint32_t size)
{
    uint32_t crc = ~0u;
    while (size--)
        crc = crc >> 8 ^ crc_table[(crc ^ *bytes++) & 255];
    return ~crc;
}

/* Fill `wanted` with what file `n` holds and return its whole size. */
static long make(uint32_t n)
{
    uint64_t state = n * 0x9e3779b97f4a7c15u;
    uint32_t length = 1 + (uint32_t)(state >> 40) % LARGEST;
    for (uint32_t i = 0; i < length; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        wanted.content[i] = (uint8_t)(state >> 56);
    }
    memcpy(wanted.header.magic, magic, sizeof magic);
    wanted.header.number = n;
    wanted.header.length = length;
    wanted.header.crc = crc_of(wanted.content, length);
    return (long)(sizeof wanted.header + length);
}

static const char *name(char *into, const char *stem, long n)
{
    char *at = into;
    for (const char *from = folder; *from;)
        *at++ = *from++;
    *at++ = '/';
    while (*stem)
        *at++ = *stem++;
    for (long unit = 100000; unit; unit /= 10)
        *at++ = (char)('0' + n / unit % 10);
    *at = 0;
    return into;
}

static void tell(const char *word, long n, int with_crc)
{
    text(word);
    number(n);
    if (with_crc) {
        text(" ");
        hex(wanted.header.crc, 8);
    }
    end_line();
}

/* Write what `wanted` holds to `path`; return 0 when all of it was taken. */
static int write_file(long size, int synced)
{
    long file = CALL3(__NR_open, path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    int failed = file < 0 || CALL3(__NR_write, file, &wanted, size) != size;
    if (synced && !failed)
        failed = CALL1(__NR_fsync, file) != 0;
    if (file >= 0)
        CALL1(__NR_close, file);
    return failed;
}

enum verdict { WHOLE, TORN, MISSING };
static const char *const verdicts[] = {"whole ", "torn ", "missing "};

static enum verdict judge(long n)
{
    long size = make((uint32_t)n), read, file = CALL3(__NR_open, name(path, "file.", n), O_RDONLY, 0);
    if (file < 0)
        return MISSING;
    read = CALL3(__NR_read, file, &found, sizeof found);
    CALL1(__NR_close, file);
    if (read != size)
        return TORN;
    for (long i = 0; i < size; i++)
        if (((uint8_t *)&found)[i] != ((uint8_t *)&wanted)[i])
            return TORN;
    return WHOLE;
}

static int write_for_ever(void)
{
    long n = 1, directory = checked("ext4_writer: open", CALL3(__NR_open, folder, O_RDONLY | O_DIRECTORY, 0));
    if (directory < 0)
        return 1;
    while (CALL2(__NR_access, name(path, "file.", n), 0) == 0)
        n++;
    if (n > 1 && judge(n - 1) != WHOLE) /* a cut came before its promise */
        n--;
    for (;; n++) {
        long size = make((uint32_t)n);
        name(path, "file.", n);
        if (write_file(size, 1) || CALL1(__NR_fsync, directory) != 0)
            break;
        tell("synced ", n, 1);
        name(path, "loose.", n % 8);
        write_file(size, 0);
        CALL2(__NR_rename, path, name(other_path, "renamed.", n % 8));
    }
    tell("full ", n, 0);
    for (;;)
        CALL0(__NR_pause);
}

static int verify(long last)
{
    long whole = 0, n;
    for (n = 1; !last || n <= last; n++) {
        enum verdict verdict = judge(n);
        if (verdict == MISSING && !last)
            break;
        tell(verdicts[verdict], n, verdict == WHOLE);
        whole += verdict == WHOLE;
    }
    text("verified ");
    number(whole);
    text(" of ");
    number(n - 1);
    end_line();
    return whole != n - 1;
}

int main(int argc, char **argv)
{
    int init = CALL0(__NR_getpid) == 1, verifying = 0, status;
    long last = 0;

    for (int i = 1; i < argc; i++) {
        if (same(argv[i], "verify"))
            verifying = 1;
        else if (argv[i][0] >= '0' && argv[i][0] <= '9')
            last = number_in(argv[i]);
        else if (argv[i][0] == '/' && length_of(argv[i]) < sizeof folder)
            memcpy(folder, argv[i], length_of(argv[i]) + 1);
    }
    make_crc_table();
    if (init) {
        CALL2(__NR_mkdir, folder, 0755);
        mount_devices();
        if (checked("ext4_writer: mount /dev/vda", CALL5(__NR_mount, "/dev/vda", folder, "ext4", 0, 0)) < 0)
            return 1;
    }
    status = verifying ? verify(last) : write_for_ever();
    if (init)
        checked("ext4_writer: umount", CALL2(__NR_umount2, folder, 0));
    return status;
}

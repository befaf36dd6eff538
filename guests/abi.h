/* abi.h -- what a guest and kvmpy agree on. Only `#define NAME integer`: the assembler, the compiler and cffi read it.
 *
 * Ports and addresses are what the board of kvmpy (kvmpy/pc) puts there. The parameter page is one page of RAM
 * that kvmpy fills before the first instruction. All fields are little-endian; offsets are in bytes from its start.
 */

/* Ports */
#define KVMPY_PORT_CONSOLE        0xe9   /* debug console: each byte written is printed; reads give 0xe9 */
#define KVMPY_PORT_EXIT           0xf4   /* a write of v ends the run with status v & 0x7f */
#define KVMPY_PORT_SERIAL         0x3f8  /* COM1, a 16550 */
#define KVMPY_IRQ_SERIAL          4
#define KVMPY_PORT_ACPI_EVENT     0x600  /* PM1a event block: status (2), enable (2) */
#define KVMPY_PORT_ACPI_CONTROL   0x604  /* PM1a control: SLP_TYP << 10 | SLP_EN << 13 powers off */
#define KVMPY_ACPI_S5             5      /* SLP_TYP of \_S5, soft off */
#define KVMPY_IRQ_ACPI            9      /* SCI */
#define KVMPY_PORT_RESET          0xcf9

/* virtio-mmio devices: device i has 4 KiB of registers at KVMPY_VIRTIO_MMIO + i * KVMPY_VIRTIO_MMIO_STRIDE */
#define KVMPY_VIRTIO_MMIO         0xd0000000
#define KVMPY_VIRTIO_MMIO_STRIDE  0x1000
#define KVMPY_VIRTIO_MMIO_MAX     16     /* devices of one machine: as many as there are interrupt pins for */

/* The parameter page */
#define KVMPY_PARAMS              0xe0000            /* its guest physical address */
#define KVMPY_PARAMS_SIZE         0x1000
#define KVMPY_PARAMS_MAGIC        0x47415079706d766b /* "kvmpyPAG" read as a little-endian u64 */
#define KVMPY_PARAMS_VERSION      1

#define KVMPY_PARAMS_OFF_MAGIC      0x00  /* u64 */
#define KVMPY_PARAMS_OFF_VERSION    0x08  /* u32 */
#define KVMPY_PARAMS_OFF_CORES      0x0c  /* u32: vCPUs of this machine */
#define KVMPY_PARAMS_OFF_ID         0x10  /* 16 bytes: the machine's UUID, as RFC 4122 orders it */
#define KVMPY_PARAMS_OFF_NAME       0x20  /* 64 bytes: the machine's name, UTF-8, NUL-terminated */
#define KVMPY_PARAMS_NAME_SIZE      0x40
#define KVMPY_PARAMS_OFF_RAM_LOW    0x60  /* u64: bytes of RAM from gpa 0 */
#define KVMPY_PARAMS_OFF_RAM_HIGH   0x68  /* u64: bytes of RAM from gpa 4 GiB */
#define KVMPY_PARAMS_OFF_STOP_GSI   0x70  /* u32: the GSI that is raised with a request */
#define KVMPY_PARAMS_OFF_REQUEST    0x74  /* u32 mailbox, host to guest: one of KVMPY_REQUEST_* */
#define KVMPY_PARAMS_OFF_ACK        0x78  /* u32 mailbox, guest to host: the request that it has seen */
#define KVMPY_PARAMS_OFF_PAIRS_LEN  0x7c  /* u32: bytes of pairs */
#define KVMPY_PARAMS_OFF_HEARTBEAT  0x80  /* u64: the guest counts here that it lives */
#define KVMPY_PARAMS_OFF_VIRTIO_COUNT 0x88 /* u32: disks of this machine, its first virtio-mmio devices */
#define KVMPY_PARAMS_OFF_VIRTIO_GSI 0x90  /* u8 for each: the GSI of disk i */
#define KVMPY_PARAMS_OFF_PAIRS      0x100 /* key=value pairs, UTF-8, each ended by NUL */

#define KVMPY_REQUEST_NONE        0
#define KVMPY_REQUEST_STOP        1
#define KVMPY_STOP_GSI            10  /* an edge with each request; to ACPI, the power button */

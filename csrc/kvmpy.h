/* kvmpy.h -- everything the shim offers to Python, in the order of the floors. Mechanism only;
 * no state but the callers', and in each thread its own number. */
#ifndef KVMPY_H
#define KVMPY_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <asm/kvm.h>
#include <asm/processor-flags.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_console.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "compat.h"
#include "memory.h"
#include "run_loop.h"
#include "assist.h"
#include "native.h"
#include "serial.h"
#include "virtqueue.h"
#include "block.h"

#endif

/* compat.h -- what kernel headers older than the ones we use lack, in this one place. */
#ifndef KVMPY_COMPAT_H
#define KVMPY_COMPAT_H

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#ifndef KVM_CAP_DISABLE_QUIRKS2
#define KVM_CAP_DISABLE_QUIRKS2 213 /* Linux 5.18 */
#endif

#endif

"""Hostile drivers against kvmpy's disks: the driver's side of a virtio-blk device, the cases, and who judges them."""

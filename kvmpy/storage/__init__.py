"""Disks as files: page blobs, VHD, raw. A leaf: knows no VM and no KVM."""

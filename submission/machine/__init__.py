"""What the machine has: devices, memory, disk, and other programs in the way."""

"""Every op of the library in plain PyTorch operators, for devices that it has no kernels for.

It takes float32 and integers. No operation reads from the device; on MPS the host waits until the
numbers of a step are copied to it. States, scales and random numbers are those of the kernels.
Without a fused multiply-add results may differ by rounding from those of the kernels, so that a
code may be the next one where a value lies at a border.
"""

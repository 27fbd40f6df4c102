"""Every op of the library in plain PyTorch operators, for devices that it has no kernels for.

It takes float32 and integers, and no operation waits for the device. States, scales and random
numbers are those of the kernels. Without a fused multiply-add results may differ by rounding from
those of the kernels, so that a code may be the next one where a value lies at a border.
"""

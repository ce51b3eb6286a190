"""Devices: number formats, compilation, packed convolutions, threads, distributed context, 8-bit images."""

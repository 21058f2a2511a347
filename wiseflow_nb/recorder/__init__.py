"""The flight recorder: a small process that samples, alerts and writes while the kernel works or dies."""

"""Tuning: what a kernel's best configuration is, measured on the device, and the store that keeps it."""

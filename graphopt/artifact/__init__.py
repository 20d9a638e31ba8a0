"""Writing artifacts: aligned safetensors files inside an uncompressed, page-aligned, reproducible archive."""

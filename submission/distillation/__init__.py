"""Few images in place of many: chosen from a pool, and sharpened."""

"""What tensor names and configs mean: layers, ties, names in files and in memory, buffers, kinds of layers."""

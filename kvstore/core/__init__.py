"""Types shared by all rooms: blocks, keys, layers, their serial form and rules. No I/O, gRPC or MLX."""

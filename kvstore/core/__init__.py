"""What every room shares: blocks, keys, layers, their serial form and rules. No I/O, no gRPC, no MLX."""

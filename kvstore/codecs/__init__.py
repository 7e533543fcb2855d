"""Arrays <-> tensors and the recipe that travels with them.

device.py      everything that touches the MLX device, and every bridge between bytes and arrays
codec.py       what a codec is; recipe -> codec
exact.py affine.py per_channel.py turboquant.py turboquant_even.py
rotation.py codebooks.py packing.py      what the last two are made of
zstd.py        frames of zstd, for exact.py and code_packing.py
pca.py         the components of a calibration: basis.py, rope.py and code_packing.py are what it is made of
profiles.py    which recipe for which part of which layer
runs.py        raw, encoded and packed runs as bytes: the store side
encode.py      raw runs -> encoded runs, as a profile says
assemble.py    runs of many blocks -> one array a part: the fetch side
states.py      window and state layers <-> the bytes of a checkpoint
virtual.py     the file out of which MLX reads what others put together
"""

from kvstore.codecs import affine, exact, pca, per_channel, turboquant, turboquant_even

__all__ = ["affine", "exact", "pca", "per_channel", "turboquant", "turboquant_even"]

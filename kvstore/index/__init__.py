"""The index: rows, children and the table of blobs, in LMDB. The only room that imports lmdb; below the engine."""

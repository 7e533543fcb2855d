"""The remote tier: blobs in a shared folder or an S3-compatible store, found and verified by their keys alone."""

"""Where blobs lie: their format, how they are written and read. The only room that knows files of blobs."""

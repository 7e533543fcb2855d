"""What `kvstore bench` runs: cases with a ceiling measured beside them."""

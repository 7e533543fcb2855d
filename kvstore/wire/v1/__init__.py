"""Generated from protos/kvstore.proto by `make proto`; do not edit."""

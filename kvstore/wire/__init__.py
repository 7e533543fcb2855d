"""The only package that touches protobuf: generated code (`v1`), conversions (`convert`), errors (`status`)."""

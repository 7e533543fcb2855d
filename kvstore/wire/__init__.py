"""The only package that touches protobuf: generated code (`v1`), nouns to messages and back (`convert`), errors (`status`)."""

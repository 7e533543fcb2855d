"""What is written and how small: admission, the write budget, the quality gate, pressure. Decisions, no bytes."""

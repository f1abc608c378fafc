"""Evidence for what the documentation says of memory and communication."""

"""KV-cache specifications and block managers of edited layers."""

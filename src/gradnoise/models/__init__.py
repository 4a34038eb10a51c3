"""The decoder-only transformer that every block trains."""

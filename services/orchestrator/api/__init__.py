"""What callers ask for: each RPC, and who may call it."""

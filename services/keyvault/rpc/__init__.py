"""RPC ↔ domain: requests in, calls of the domain, answers out."""

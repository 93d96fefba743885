"""One host: the services, OpenBao and PostgreSQL in containers."""

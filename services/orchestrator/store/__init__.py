"""PostgreSQL: each table with what is done to it."""

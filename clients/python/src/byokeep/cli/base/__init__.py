"""What every command is made of: its session, its output, its errors."""

"""`make bench`: figures, never assertions. Each module measures one thing and returns rows."""

"""A summary that is carried along instead of pairs."""

"""Files that travel with attempts: what is fetched before one starts, and what it leaves (DESIGN 10, PROTOCOL F1)."""

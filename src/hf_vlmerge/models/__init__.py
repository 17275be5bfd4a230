"""Model families, one closed folder each: exactly the files that travel to the Hub as remote code."""

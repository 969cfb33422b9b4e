"""From files, published datasets and procedural tasks to token ids with labels."""

"""What an edge shows to people and programs on its device."""

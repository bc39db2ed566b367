"""The networks, and the directories that they are kept in."""

"""What a user runs: each script is one screen, and its inside lies in the room of that name. They need a clone."""

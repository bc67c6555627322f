"""Inference between nodes: `messages` says what is sent, `serving` is a stage's end, `coordinator` the asker's."""

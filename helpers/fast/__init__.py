"""Speed, used on request only: packed rows, compiled blocks, a recorded step, BLOOM's attention."""

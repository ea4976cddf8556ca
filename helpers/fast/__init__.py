"""Speed: answers on a CPU; on request packed rows, compiled blocks, a recorded step, BLOOM."""

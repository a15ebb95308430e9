"""What every part uses: errors, files, randomness, devices, processes, pictures."""

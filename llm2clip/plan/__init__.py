"""What both stages will take, before anything is started: memory, disk, FLOPs, hours, and what would not fit."""

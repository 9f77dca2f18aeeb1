"""What a run needs of its machines: memory, time, images, and the checks before the first job."""

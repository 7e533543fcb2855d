"""Numbers for machines that watch machines."""

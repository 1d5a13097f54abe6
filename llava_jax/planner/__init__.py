"""Programs for TPUs that are not there: slices by name, for the real TPU compiler."""

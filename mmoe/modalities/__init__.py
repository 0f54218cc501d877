"""Says of each built-in modality how it is planned, encoded and laid out: one a file, loaded when it is asked for."""

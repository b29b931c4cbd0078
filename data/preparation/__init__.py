"""The steps of `ultrarec prepare`: find and read the log, check it, split it, write the histories."""

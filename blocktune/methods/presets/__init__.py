"""Published methods, one file each; importing a file enters it into the table."""

"""The report of a finished run: one self-contained HTML file, and its charts as PNG files."""

"""Tables and figures from the files that runs leave behind."""

"""Supporting code: flags, files, downloads, checkpoint layouts, photographs, drawing."""

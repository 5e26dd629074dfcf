"""What nobody comes to read: flags, files, downloads, checkpoint layouts, photographs, drawing."""

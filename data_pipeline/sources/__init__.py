"""Where images, masks and labels come from; each source lists items and reads them on demand."""

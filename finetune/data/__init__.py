"""From a folder or CSV of images to tables, pixels and batches."""

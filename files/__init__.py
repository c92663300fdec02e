"""Reading and writing files: records line by line or out of tables, images by path or by id."""
